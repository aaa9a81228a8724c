"""What an audit asked and what came back, as one page without any other file: `tools/audit.py --html`."""

from __future__ import annotations

import html
from collections.abc import Mapping
from typing import Any

# What each check asks. The page shows it beside the answer.
ASKED = {
    "future invariance": "Every token after a target is replaced. Does anything reported up to that target change?",
    "counterfactual mass": "Do the stated distributions sum to 1? Is the token that came scored by its entry, and a "
    "token put in its place by the entry of that one, whatever follows?",
    "next token unknown": "A token and what follows are replaced. Does any earlier score change by a bit?",
    "prefix alone": "Does a mixer give the first targets of a long stream what it gives them where nothing follows?",
    "own target unknown": "Does the entropy of a prediction depend on the token that it predicts?",
    "training after scoring":
    "Each round of test-time training is left out. Does a score change that it must not touch?",
    "awkward lengths": "Does every target of a stream get one finite score, whatever the length?",
    "every target once": "Is the model asked for each target once, from left to right?",
    "bytes of the text": "Are the bytes that the score is divided by those of the decoded text?",
    "sums": "Are loss and bits per byte the sums that they are named for?",
    "real command": "On a small split: are the command's targets, bytes and last line those that the shard, the "
    "decoded text and the scorer's distributions give?",
    "evaluation seconds from outside": "Does the command claim as many seconds as pass outside it?",
    "training seconds from outside": "Does the training claim as many seconds as pass outside it?",
    "code files": "Does the command open anything beside the code files that the ledger counts?",
    "files and network": "Does the command open other files, start a process or use a network?",
    "ledger": "Do artifact and code files stay within the limit?",
    "bare process": "Artifact and code alone, no network, nothing else to open: are the scores the same bits?",
    "files opened": "Does training open a validation shard, or anything but train shards, code and its own files?",
    "other shards": "Does training give the same weights with another validation split, one without content?",
    "decoding": "Does a stretch of text come back from the bits of its score, in a process without the text?",
    "training seconds": "Do the seconds of training in the log keep the limit?",
    "evaluation seconds": "Do the seconds of evaluation in the log keep the limit, and cover its stages?",
    "logged bytes": "Do the bytes in the log keep the limit?",
    "logged mass": "Is any result in the log marked invalid, or has a mass that is not 1?",
    "logged split": "Are the targets and bytes in the log those of the whole split in the shards?",
}

STYLE = (
    "body{font:15px/1.45 system-ui,sans-serif;max-width:72em;margin:2em auto;padding:0 1em;color:#222;background:#fff}"
    "table{border-collapse:collapse;width:100%}td,th{text-align:left;vertical-align:top;padding:.25em .8em .25em 0;"
    "border-bottom:1px solid #ddd}td.s{text-align:right;white-space:nowrap}.ok{color:#176b2c}.fail{color:#b3261e;"
    "font-weight:bold}.note{color:#555}@media(prefers-color-scheme:dark){body{color:#ddd;background:#161616}"
    "td,th{border-color:#444}.ok{color:#7bc98f}.fail{color:#ff8a80}.note{color:#aaa}}"
)


def page(result: Mapping[str, Any]) -> str:
    """The HTML of what `--json` holds: condition by condition what was asked, what came back, and the seconds."""
    verdict = "valid: all checks hold" if result["valid"] else "INVALID: " + "; ".join(result["violated"])
    subject = result["artifact"] or "a small model, trained on the spot"
    tested = f"{subject}; code {result['code']}; {len(result['findings'])} checks, {result['seconds']:.0f} s; "
    parts = [
        '<!doctype html><html lang="en"><meta charset="utf-8"><title>Audit</title>',
        f"<style>{STYLE}</style><h1>Audit</h1>",
        f'<p class="{"ok" if result["valid"] else "fail"}">{html.escape(verdict)}</p>',
        f'<p class="note">{html.escape(tested)}drawn by --seed {result["seed"]}. These are tests: what they did not '
        "draw they did not see. Only decoding shows a code length, of the stretch that came back.</p>",
        *(f"<p>{html.escape(sentence)}</p>" for sentence in result["decoded"]),
    ]
    for condition in dict.fromkeys(finding["condition"] for finding in result["findings"]):
        parts.append(f"<h2>{html.escape(condition)}</h2><table>")
        parts.append("<tr><th>asked</th><th>of</th><th>came back</th><th>s</th></tr>")
        asked = ""
        for finding in result["findings"]:
            if finding["condition"] == condition:
                question = f"<b>{html.escape(finding['check'])}</b><br>{html.escape(ASKED.get(finding['check'], ''))}"
                mark = "ok" if finding["ok"] else "fail"
                parts.append(
                    f"<tr><td>{question if question != asked else ''}</td><td>{html.escape(finding['subject'])}</td>"
                    f'<td><span class="{mark}">{mark.upper()}</span> {html.escape(finding["figure"])}</td>'
                    f'<td class="s">{finding["seconds"]:.1f}</td></tr>'
                )
                asked = question
        parts.append("</table>")
    return "\n".join(parts) + "\n"
