r"""Is a free-form answer right? 2\sqrt{3} is, where \sqrt{12} is true; 3526*17 is not.

    read_boxed   the answer of a response that gives it in \boxed{...}
    tidy         an answer without what may stand around it: dollar signs, a period
    same         is the given answer the true one?
    is_copied    does the answer only repeat the question?

An answer is a *value in the form that was asked for*: 3526*17 is no answer to "3526*17 = ?", though
it is equal. So an answer is first read without its typesetting (tasks/latex.py). Equal texts earn.
All else earns only as a value that is worked out, with the true one's unit, brackets and letters;
whether the two values are equal is then asked of the package math-verify, if it is installed, in a
process of its own (tasks/judge.py). It sees what was read, never the response's own text.
"""

import contextlib
import functools
import importlib.util
import re

from tasks.base import END
from tasks.judge import Judge
from tasks.latex import (
    RELATIONS,
    UNORDERED,
    Unreadable,
    about,
    by_value,
    exact,
    is_worked,
    joins_numbers,
    read_tree,
    subtrees,
    symbols,
    to_latex,
    tokens,
)

MAX_ANSWER = 1000  # characters; a longer answer is wrong


# ------------------------------------------------------------------- the answer in a response

_BRACE = re.compile(r"\\boxed\s*\{|\\[{}]|[{}]")


def read_boxed(text):
    r"""The content of the last complete `\boxed{...}` before any `END`, or None.

    The papers' graders read it so. Of boxes inside one another, the one that begins last is the
    last one. Takes linear time.
    """
    last_start, last_end = None, None
    starts = []  # one per open brace: where the content of a box begins, or None if it is no box's
    for brace in _BRACE.finditer(text.partition(END)[0]):
        if brace[0] in (r"\{", r"\}"):  # a set's brace, which groups nothing
            continue
        if brace[0] == "{":
            starts.append(None)
        elif brace[0] != "}":
            starts.append(brace.end())
        elif starts:
            start = starts.pop()
            if start is not None and (last_start is None or start > last_start):
                last_start, last_end = start, brace.start()
    if last_start is None:
        return None
    return text[last_start:last_end].strip()


# ----------------------------------------------------------------------- two answers compared

# What may stand around an answer. In each alternative one group, the answer.
_WRAPPED = re.compile(
    r"\$\$?((?:[^$\\]|\\.)*)\$\$?"
    r"|\\\((.*)\\\)"
    r"|\\\[(.*)\\\]"
    r"|\\(?:text|textbf|mathrm|mathbf|boxed)\{((?:[^{}]|\{[^{}]*\})*)\}"
)
_AS_LATEX = {ord("−"): "-", ord("°"): r"^\circ"}
_DOLLAR = re.compile(r"(?<!\\)\$(?=\s*[0-9.])")  # before a number


def tidy(text):
    r"""Without $ signs, \text{} and a period around it, and with single blanks; $5 as \$5. If
    nothing is left, the text as it was."""
    tidied = " ".join(text.translate(_AS_LATEX).split())
    if tidied.count("$") == 1:  # typesetting needs two
        tidied = _DOLLAR.sub(r"\\$", tidied)
    unwrapped = _unwrapped(tidied)
    while unwrapped != tidied:
        tidied = unwrapped
        unwrapped = _unwrapped(tidied)
    return tidied or text


def _unwrapped(text):
    """Without a period at the end, and then without one of the wrappings around it."""
    text = text.rstrip(" .")
    wrapped = _WRAPPED.fullmatch(text)
    if wrapped is None:
        return text
    return wrapped[wrapped.lastindex].strip()


# The responses of a group give equal answers, among them some that take math-verify seconds.
@functools.lru_cache(4096)
def same(given, true):
    """Is the given answer the true one?

    Equal texts are, without their typesetting. Any other answer has to be a value in its form: not
    unworked (`is_worked`), with the true one's unit, brackets and letters (`other_form`). Then
    equal numbers are the same (0.5, .5, 1/2; 1,234), as are equal multiples of a root or of pi, and
    on all else math-verify decides, if it is installed.
    """
    if len(given) > MAX_ANSWER:
        return False
    if has_same_text(given, true):
        return True
    given, true = tidy(given), tidy(true)
    if _has_only_words(true):
        return False  # to math-verify "act" is a*c*t, and so is "cat"
    pair = _read_alike(tokens(given), tokens(true))
    if pair is None or other_form(*pair):
        return False
    given_tree, true_tree = pair
    if by_value(given_tree) == by_value(true_tree):
        return True
    given_exact, true_exact = exact(given_tree), exact(true_tree)
    if given_exact and true_exact and given_exact.keys() == true_exact.keys():
        return given_exact == true_exact
    if importlib.util.find_spec("math_verify") is None:
        return False
    return bool(_MATH_VERIFY(_for_judge(given_tree), _for_judge(true_tree)))


def has_same_text(given, true):
    """Are the two one text, but for typesetting, and in words for capitals?"""
    given, true = tidy(given), tidy(true)
    if given == true:
        return True
    if _is_letters(given) and _is_letters(true):
        return given.casefold() == true.casefold()
    words = tokens(given)
    return bool(words) and words == tokens(true)


def _is_letters(text):
    return text.replace(" ", "").isalpha()


def is_copied(given, true, question):
    """Does the answer stand in the question, in a form that the true answer does not have?

    To factor x^2-1 is more than to repeat it. What counts is the value, without a unit or a name
    before it: of "AB is 5 cm long" the 5 is no copy if 5 is right. Nor is the 0.5 of "heads with
    probability 0.5" where 1/2 is right: a number may be written in any of its ways, if the question
    does not ask for another one (`_ASKS_FOR_A_FORM`).
    """
    if has_same_text(given, true):
        return False
    value, true_value = _value(given), _value(true)
    if value is None or value == true_value:
        return False
    is_number = value[0] == "number" and by_value(value) == by_value(true_value or value)
    if is_number and not _ASKS_FOR_A_FORM.search(question):
        return False
    return value in _expressions(question)


_ASKS_FOR_A_FORM = re.compile(
    r"decimal|fraction|percent|mixed number|lowest terms|simpl|reduce|convert|express|write", re.I
)


def _value(text):
    """The tree of an answer without name and unit, or None."""
    _, words = _split_name(tokens(tidy(text)))
    try:
        return _split_unit(words)[0]
    except Unreadable:
        return None


@functools.lru_cache(256)
def _expressions(question):
    """All that can be read in a question, and every part of it, as trees."""
    found = set()
    for run in (*_runs(question, 1), *_runs(question, 2)):
        for words in (run, *_split_at(run, (",", *RELATIONS))):
            if len(words) <= MAX_ANSWER:
                with contextlib.suppress(Unreadable):
                    found.update(subtrees(_split_unit(words)[0]))
    return found


def _runs(question, longest):
    """The tokens between dollar signs, stops and words that are longer than so many letters."""
    runs = []
    for piece in re.split(r"\$+|\\[()\[\]]", question.translate(_AS_LATEX)):
        runs.append([])
        for token in tokens(piece):
            is_prose = token.kind == "text" or (token.kind == "word" and len(token) > longest)
            if is_prose or token in (".", "?", ":", ";"):
                runs.append([])
            else:
                runs[-1].append(token)
    return runs


def _split_at(words, marks):
    parts = [[]]
    for word in words:
        if word in marks:
            parts.append([])
        else:
            parts[-1].append(word)
    return parts


# ------------------------------------------------------------------- names, units, and the form


def _read_alike(given, true):
    """Two answers' tokens as the trees that are to be compared, or None if there are none, or if
    their names or units differ.

    A name before a value (x=16, f(x)=2x, x in (1,2)) or a unit behind it may be left out by either
    side, but not be another one. A percent sign is no unit: it divides by 100. Nor are words that
    make another value of a number: 5 million, 5 or more.
    """
    (given_name, given_rest), (true_name, true_rest) = _split_name(given), _split_name(true)
    try:
        if "=" in given and "=" in true and given_name != true_name:
            # Two curves, y=2x+1 and 2x-y=-1; but x+1=17 is no solution like x=16
            is_curve = true_name is None or symbols(read_tree(true_rest))
            return (read_tree(given), read_tree(true)) if is_curve else None
        if given_name and true_name and given_name != true_name:
            return None
        (given_tree, given_unit), (true_tree, true_unit) = map(_split_unit, (given_rest, true_rest))
        if given_unit and true_unit:
            return (given_tree, true_tree) if given_unit == true_unit else None
        unit, other_tree = given_unit or true_unit, true_tree if given_unit else given_tree
        if _CHANGES_VALUE.match(unit) or (unit and symbols(other_tree)):
            # "2ab" beside "ab*2": no unit, but letters
            return read_tree(given_rest), read_tree(true_rest)
        return given_tree, true_tree
    except Unreadable:
        return None


_NAME = re.compile(r"\\?[A-Za-z]+(?: _ \w+)?(?: \( [A-Za-z]+ \))? (?:=|∈)")


def _split_name(words):
    """(the name before a value or None, the tokens after it)"""
    name = _NAME.match(" ".join(words))
    if name is None:
        return None, words
    length = len(name[0].split())
    if any(word in RELATIONS for word in words[length:]):
        return None, words
    return words[: length - 1], words[length:]


_CURRENCY = (r"\$", "£", "€", "¥")
_UNIT_MARKS = ("°", "%", "/", "^", ".", "*", *_CURRENCY)
_CHANGES_VALUE = re.compile(
    r"%|(?:(?:hundred|thousand|million|billion|trillion)(?:th)?s?|dozens?|hal(?:f|ves)|thirds?"
    r"|(?:four|fif|six|seven|eigh|nin|ten)ths?|squared|cubed|factorial|.*\b(?:and|or|not))\b"
)
_MEGA = re.compile(r"\bM(?=(?:Wh?|Hz|Pa|J|V|A|N|g|m|s|eV|b)\b)")
_BYTES = re.compile(r"(?<=\b[kKMGT])B\b")


def _split_unit(words):
    """(the tree of an answer without its unit, the unit in lower case). Unreadable if there is no
    tree. A unit stands behind a value without letters: cm, square feet, m/s^2, °, % (or is a
    currency before it); a single letter is none unless it is in \\text."""
    sign = words[: words[:1] == ["-"]]
    rest = words[len(sign) :]
    if rest and rest[0] in _CURRENCY:
        return read_tree([*sign, *rest[1:]]), str(rest[0])
    for at in range(len(words) - 1, 0, -1):
        is_power = words[at].kind == "number" and words[at - 1] == "^"
        is_of_unit = words[at].kind in ("word", "text") or words[at] in _UNIT_MARKS or is_power
        if not is_of_unit:
            break
    else:
        at = 0
    for start in range(at + 1, len(words)):
        first = words[start]
        is_word = first.kind == "text" or (first.kind == "word" and len(first) > 1)
        if is_word or first in ("°", "%", *_CURRENCY):
            with contextlib.suppress(Unreadable):
                tree = read_tree(words[:start])
                if not symbols(tree):
                    unit = [word for word in words[start:] if word != "."]
                    return tree, _in_lower_case(" ".join(unit))
            break
    return read_tree(words), ""


def _in_lower_case(unit):
    """But MW stays apart from mW, and MB from Mb."""
    return _MEGA.sub("mega ", _BYTES.sub("byte", unit)).casefold()


def other_form(given, true):
    r"""Does an answer differ from the true one in its form, whatever their values? Both as trees.

    unworked    3526*17, 10!, 2^{10}, \sqrt{12}, 12/18, \ln e, where the true answer has it not
    joined      a true answer of two plain numbers with a sign between them: a date, a score, a size
    letters     3+x-x is not 3
    kind        (1,2), [1,2], 1,2 and \{1,2\}; x<2 and 2
    """
    if not is_worked(given, set(subtrees(true))) or joins_numbers(true):
        return True
    is_compound = "list" in (given[0], true[0]) or "relation" in (given[0], true[0])
    return symbols(given) != symbols(true) or (is_compound and given[:2] != true[:2])


def _has_only_words(text):
    """Neither a digit nor a command of LaTeX, but two letters side by side; not A and C."""
    text = re.sub(r"\b(?:and|or)\b", ",", text)
    return not re.search(r"[0-9\\]", text) and bool(re.search(r"[^\W\d_]{2}", text))


# ------------------------------------------------------- math-verify, in a process of its own


def _for_judge(tree):
    """A tree as JSON: [kind, do its members come in any order?, members], or else its LaTeX, and
    its value `exact` and `about`. math-verify rounds, so it is asked only where those cannot tell.
    """
    kind, *members = tree
    if kind == "list":
        return [members[0], members[0] in UNORDERED, [*map(_for_judge, members[1:])]]
    if kind == "relation" and members[0] != "=":
        return [members[0], False, [*map(_for_judge, members[1:])]]
    multiples = {of: str(factor) for of, factor in (exact(tree) or {}).items()}
    return {"latex": to_latex(tree), "exact": multiples, "about": about(tree)}


_MATH_VERIFY = Judge(
    "math-verify",
    r"""
import math
from math_verify import LatexExtractionConfig, parse, verify

def read(text):  # as LaTeX only: plain expressions would go through Python's eval
    return parse(r"\boxed{" + text + "}", [LatexExtractionConfig()], parsing_timeout=None)

def judge(given, true):
    if isinstance(given, dict) and isinstance(true, dict):
        if given["exact"] and given["exact"].keys() == true["exact"].keys():
            return given["exact"] == true["exact"]
        if given["about"] is not None and true["about"] is not None:
            if not math.isclose(given["about"], true["about"], rel_tol=1e-5, abs_tol=1e-12):
                return False  # rounded to six places, small numbers would all be 0
        return verify(read(true["latex"]), read(given["latex"]), timeout_seconds=None)
    if isinstance(given, dict) or isinstance(true, dict) or given[:2] != true[:2]:
        return False
    kind, in_any_order, members = given
    left = list(true[2])
    for member in members:  # each takes the first that is left, or the first that is like it
        like = [one for one in (left if in_any_order else left[:1]) if judge(member, one)]
        if not like:
            return False
        left.remove(like[0])
    return not left
""",
)
