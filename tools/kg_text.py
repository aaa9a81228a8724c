"""Reads typed relations and word counts out of English text by lexical patterns; stdlib only.

Precision goes before recall: a relation counts where a trigger phrase stands between two noun phrases that
plainly are its subject and its object, and nowhere else.
"""

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple


def word_set(text: str) -> frozenset[str]:
    """Return the words of `text`."""
    return frozenset(text.split())


# Function words by closed class: they carry grammar, not content, so they neither join a relation nor rank.
DETERMINERS = word_set(
    """
    a an the this that these those each every either neither some any all both half several many much
    more most few fewer less least other another such same own certain various enough what which whose
    my your his her its our their no none one two three four five six seven eight nine ten first second
    third last next former latter
    """
)
PRONOUNS = word_set(
    """
    i me mine myself you yours yourself yourselves he him himself she hers herself it itself we us ours
    ourselves they them theirs themselves who whom whoever whatever whichever someone somebody something
    anyone anybody anything everyone everybody everything nobody nothing there here thee thou thy ye
    """
)
PREPOSITIONS = word_set(
    """
    about above across after against along amid among amongst around as at before behind below beneath
    beside besides between beyond by concerning considering despite down during except for from in
    inside into like near of off on onto out outside over past per regarding since through throughout
    till to toward towards under underneath unlike until unto up upon via versus vs with within without
    """
)
CONJUNCTIONS = word_set(
    """
    and or but nor so yet if unless because although though while whereas whether when whenever where
    wherever why how than then thus hence therefore however moreover furthermore otherwise nevertheless
    """
)
BE = word_set("be am is are was were been being")
AUXILIARIES = BE | word_set(
    """
    have has had having do does did doing done can could may might must shall should will would ought
    let
    """
)
ADVERBS = word_set(  # of degree, focus, frequency and connection
    """
    not never also often usually always sometimes generally typically frequently mostly mainly largely
    only just even still already now again once ever too very quite rather almost nearly really perhaps
    maybe probably directly actually simply thereby soon later away back together instead indeed well
    yes please etc eg ie today tomorrow yesterday
    """
)
CLOSED_CLASS = DETERMINERS | PRONOUNS | PREPOSITIONS | CONJUNCTIONS | AUXILIARIES | ADVERBS
NEGATIONS = word_set("not never no nor none neither nothing cannot hardly rarely")
CLAUSE_STARTS = CONJUNCTIONS | {"that"}
IRREGULAR_PLURALS = word_set("people men women children data media criteria mice feet police")


class Pattern(NamedTuple):
    """What a trigger phrase in a text means.

    `place`: the head noun is the subject of an active verb ("singular", "plural" or "any" by the verb's
    form), of a form of `be` ("copula"), just before the phrase ("infix"), or after it ("between X and Y").
    """

    relation: str
    place: str
    inverse: bool = False  # the first noun is the relation's tail


# Verb stem | particle; "<" marks verbs whose subject is the tail.
ACTIVE_VERBS = {
    "CAUSES": "cause;trigger;provoke;produce;lead|to;result|in;give|rise to;bring|about;contribute|to",
    "REQUIRES": "require;need;necessitate;presuppose;depend|on;depend|upon;rely|on;rely|upon",
    "SOLVES": "solve;resolve;cure;fix;remedy;alleviate;mitigate",
    "CONTRADICTS": "contradict;refute;disprove;oppose;conflict|with;run|counter to",
    "ENABLES": "enable;allow;permit;facilitate",
    "IMPROVES": "improve;enhance;boost;strengthen;speed|up",
    "PART_OF": "belong|to;<contain;<comprise;<consist|of;<include",
    "ALTERNATIVE_TO": "supersede;substitute|for",
    "CONNECTS_TO": "connect|to;connect|with;relate|to;interact|with;correspond|to;communicate|with",
}
IRREGULAR_PAST = {"lead": "led", "give": "gave", "bring": "brought", "run": "ran"}
COPULA_PHRASES = {
    "CAUSES": "<caused by;<due to;<the result of;the cause of;the causes of",
    "REQUIRES": "<required for;<required by;<essential for;<essential to;<necessary for;<needed for;"
    "dependent on",
    "SOLVES": "a solution to;a solution for;the solution to;a cure for;a remedy for;<solved by;<resolved by",
    "CONTRADICTS": "incompatible with;inconsistent with;contrary to;the opposite of;at odds with",
    "ENABLES": "<made possible by",
    "IMPROVES": "<improved by;<enhanced by",
    "PART_OF": "part of;a part of;an important part of;a component of;a member of;<composed of;<made up of",
    "ALTERNATIVE_TO": "an alternative to;a substitute for;a replacement for;replaced by;replaced with",
    "CONNECTS_TO": "connected to;connected with;linked to;linked with;related to;associated with;tied to",
}
INFIX_PHRASES = {
    "TRADEOFF_OF": "at the expense of;at the cost of",
    "ALTERNATIVE_TO": "instead of;rather than;in place of;in lieu of;as opposed to",
}
BETWEEN_PHRASES = {
    "TRADEOFF_OF": "tradeoff;tradeoffs;trade-off;trade-offs;balance;compromise",
    "CONTRADICTS": "conflict;contradiction;tension",
    "CONNECTS_TO": "relationship;connection;link;relation;interaction;association",
}


def verb_forms(verb: str) -> tuple[str, str, str]:
    """Return base, third-person and past forms of a verb of `ACTIVE_VERBS`."""
    if verb.endswith("y"):
        third, past = verb[:-1] + "ies", verb[:-1] + "ied"
    else:
        third = verb + ("es" if verb.endswith(("x", "ss")) else "s")
        past = verb + ("d" if verb.endswith("e") else "ed")
    return verb, third, IRREGULAR_PAST.get(verb, {"permit": "permitted"}.get(verb, past))


def trigger_patterns() -> dict[str, Pattern]:
    """Return every trigger phrase, in lower case, with its meaning."""
    patterns: dict[str, Pattern] = {}

    def entries(table: Mapping[str, str]) -> Iterator[tuple[str, str, bool]]:
        for relation, phrases in table.items():
            for phrase in phrases.split(";"):
                yield relation, phrase.removeprefix("<"), phrase.startswith("<")

    for relation, phrase, inverse in entries(ACTIVE_VERBS):
        verb, _, particle = phrase.partition("|")
        for form, place in zip(verb_forms(verb), ("plural", "singular", "any"), strict=True):
            patterns[f"{form} {particle}".strip()] = Pattern(relation, place, inverse)
    for relation, phrase, inverse in entries(COPULA_PHRASES):
        patterns[phrase] = Pattern(relation, "copula", inverse)
    for relation, phrase, inverse in entries(INFIX_PHRASES):
        patterns[phrase] = Pattern(relation, "infix", inverse)
    for relation, phrase, inverse in entries(BETWEEN_PHRASES):
        patterns[f"{phrase} between"] = Pattern(relation, "between", inverse)
    # As adjectives before a noun these two are commoner than as verbs: "the required files".
    del patterns["required"], patterns["needed"]
    return patterns


def prefix_tree_regex(phrases: Iterable[str]) -> str:
    """Return a regular expression for any of `phrases`, longest first; faster than a plain list."""
    by_first: dict[str, list[str]] = {}
    for phrase in sorted(phrases):
        by_first.setdefault(phrase[:1], []).append(phrase[1:])
    ends_here = by_first.pop("", None) is not None
    branches = "|".join(re.escape(first) + prefix_tree_regex(rest) for first, rest in by_first.items())
    return f"(?:{branches}){'?' if ends_here else ''}" if branches else ""


PATTERNS = trigger_patterns()
TRIGGER = re.compile(r"(?<=\s)" + prefix_tree_regex(PATTERNS) + r"(?=\s)")
TOKEN = re.compile(r"[^\W\d_]+(?:['\u2019-][^\W\d_]+)*|[^\s\w]|\w+")
WORD = re.compile(r"[A-Za-z]+(?:['\u2019-][A-Za-z]+)*")
AFTER_NOUN = re.compile(r"(?:ly|[^e]ed)$")  # adverbs and participles: "files stored", "damage generally"
CONTEXT_CHARACTERS = 120  # how far from a trigger a subject or an object is looked for
MAX_PHRASE_WORDS = 3


def is_content(token: str) -> bool:
    """Tell whether a lower-case token can be the head of a noun phrase."""
    return len(token) > 1 and token.isalpha() and token.isascii() and token not in CLOSED_CLASS


def is_plural(noun: str) -> bool:
    """Guess grammatical number by form."""
    return noun in IRREGULAR_PLURALS or (noun.endswith("s") and not noun.endswith(("ss", "us", "is")))


def phrase_after(tokens: Sequence[str]) -> tuple[str, int] | None:
    """Return the head of the noun phrase at the start of `tokens` and the index after the phrase.

    The head is the last of at most three content words after an optional determiner. Returns None where there
    is none, where it is negated, or where it is longer, hence probably a clause.
    """
    start = 1 if tokens and tokens[0] in DETERMINERS and tokens[0] not in NEGATIONS else 0
    end = start
    while end < len(tokens) and is_content(tokens[end]):
        end += 1
    stop = end
    while stop > start and AFTER_NOUN.search(tokens[stop - 1]):
        stop -= 1
    if not start < stop <= start + MAX_PHRASE_WORDS:
        return None
    return tokens[stop - 1], end


def subject_before(tokens: Sequence[str]) -> tuple[str, set[str]] | None:
    """Return the head noun and the auxiliaries of the clause that ends `tokens`.

    The clause must hold nothing else: a conjunction, punctuation or the start of the text comes first, then
    one noun phrase, "of" and another one perhaps, adverbs and auxiliaries. Otherwise the word before the verb
    need not be its subject ("the storm that hit the city caused damage"), and None is returned.
    """
    end = len(tokens)
    while end and (tokens[end - 1] in AUXILIARIES or tokens[end - 1] in ADVERBS):
        end -= 1
    auxiliaries = set(tokens[end:])
    if auxiliaries & NEGATIONS:
        return None
    for _ in range(2):
        start = end
        while start and is_content(tokens[start - 1]):
            start -= 1
        if not 0 < end - start <= MAX_PHRASE_WORDS:
            return None
        head = tokens[end - 1]
        if start and tokens[start - 1] in DETERMINERS - CLAUSE_STARTS:
            start -= 1
        if start == 0 or not tokens[start - 1][0].isalnum() or tokens[start - 1] in CLAUSE_STARTS:
            negated = start < end and tokens[start] in NEGATIONS
            return None if negated else (head, auxiliaries)
        if tokens[start - 1] != "of":
            return None
        end = start - 1
    return None


def head_before(tokens: Sequence[str], place: str) -> str | None:
    """Return the noun before a trigger phrase that stands in the relation, or None where that is unsure.

    A verb agrees with its subject in number: that tells "storms cause damage" from "root cause analysis".
    """
    if place == "infix":
        nouns = [token for token in tokens[-2:] if token not in {"come", "comes", "came"}][-1:]
        return nouns[0] if nouns and is_content(nouns[0]) else None
    subject = subject_before(tokens)
    if subject is None:
        return None
    head, auxiliaries = subject
    if place == "copula":
        agrees = bool(auxiliaries & BE)
    elif place == "singular":
        agrees = not auxiliaries & AUXILIARIES and not is_plural(head)
    elif place == "plural":
        agrees = bool(auxiliaries & AUXILIARIES - BE) or is_plural(head)
    else:
        agrees = True
    return head if agrees and (place == "copula" or not auxiliaries & BE) else None


def extract_relations(text: str) -> list[tuple[str, str, str]]:
    """Return (head, relation type, tail) of the relations that `text` states, nouns in lower case."""
    text = text.lower()
    found: list[tuple[str, str, str]] = []
    for match in TRIGGER.finditer(text):
        relation, place, inverse = PATTERNS[match.group()]
        rest = TOKEN.findall(text[match.end() : match.end() + CONTEXT_CHARACTERS].split("\n", 1)[0])
        after = phrase_after(rest)
        if after is None:
            continue
        tail, end = after
        rest = rest[end:]
        if place == "between":
            second = phrase_after(rest[1:]) if rest[:1] == ["and"] else None
            if second:
                found.append((tail, relation, second[0]))
            continue
        if relation in {"CAUSES", "ENABLES"} and len(rest) > 1 and rest[0] == "to" and is_content(rest[1]):
            tail = rest[1]  # "allows users to upload" enables the upload
        start = max(0, match.start() - CONTEXT_CHARACTERS)
        before = ("x " if start else "") + text[
            start : match.start()
        ]  # "x": what is cut off starts no clause
        head = head_before(TOKEN.findall(before.rsplit("\n", 1)[-1]), place)
        if head and head != tail:
            found.append((tail, relation, head) if inverse else (head, relation, tail))
    return found


@dataclass
class TextFacts:
    """What a text tells: in how many documents each word form occurs, how often each relation is stated."""

    words: Counter[str] = field(default_factory=Counter)
    relations: Counter[tuple[str, str, str]] = field(default_factory=Counter)


def read_batch(texts: Sequence[str]) -> TextFacts:
    """Return the facts in a batch of documents; runs in a worker process."""
    facts = TextFacts()
    for text in texts:
        facts.words.update(set(WORD.findall(text)))
        facts.relations.update(extract_relations(text))
    return facts
