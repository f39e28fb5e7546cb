r"""An answer read as mathematics: what is left of it without its typesetting.

    tokens     \left( 3526 \times 17 \,\right) is ( 3526 * 17 )
    read_tree  tokens as a tree: a number, a product of two, a set of three
    is_worked  is the tree a value in its normal form, with no operation left to be worked?
    by_value   the tree with 0.5 and 1/2 as one and the same number
    exact      the tree as multiples of 1, of roots and of \pi, e and i
    about      the value of the tree as a float
    to_latex   the tree as plain LaTeX, every order of operations in brackets

A tree is a tuple, its kind first. The members of sums, products, sets and lists are in one fixed
order, so trees that differ in nothing else are equal:

    ("number", "3/4")                 as it was written, but for 1,234 and .5: "1234", "0.5"
    ("symbol", "x")                   and ("constant", r"\pi"), which is a value of its own
    ("sum", a, b, ...), ("product", a, b, ...), ("quotient", a, b), ("power", a, b)
    ("root", index, radicand), ("call", name, a, b, ...)
    ("list", kind, a, b, ...)         kind "()", "[)", "{}", "," without brackets, "union"
    ("relation", "<=", a, b)

Not LaTeX as a whole: what a final answer is made of. Of anything else (integrals, matrices, prose)
there is no tree.
"""

import math
import re
from fractions import Fraction

MAX_DEPTH = 20  # of brackets inside one another
MAX_DIGITS = 1000  # of a number
MAX_RADICAND = 10**9  # of a root that is looked at for squares
MAX_BITS = 10_000  # of a number that is worked out


class Unreadable(ValueError):
    """A text that is no answer in mathematics."""


# ------------------------------------------------------------------------------------- tokens

_IGNORED = re.compile(
    r"\\(?:left|right|[bB]igg?[lr]?|displaystyle|textstyle|limits|q?quad)(?![A-Za-z])"
    r"|\\[,;:!()\[\] ]|[$~\s]"
)
_WRAPPER = re.compile(
    r"\\(?:(?P<text>text(?:bf|it|rm)?|mathrm|[mf]box|operatorname)|mathbf|mathit|boxed)\s*\{"
)
_PLAIN_NUMBER = re.compile(r"[0-9]+(?:\.[0-9]+)?|\.[0-9]+")
_DOTTED = re.compile(r"[0-9]+(?:\.[0-9]+){2,}")  # 1.10.2024
_DECIMAL_COMMA = re.compile(r"[0-9]+,0[0-9]+")  # 1,05
_LONG_NUMBER = re.compile(
    r"[1-9][0-9]{0,2}(?:(?:,\\!\s*|\{,\}\s*|,)[0-9]{3})+(?![0-9])(?:\.[0-9]+)?"
)
_WORD = re.compile(r"[A-Za-z]+")
_REWRITTEN = [
    (re.compile(r"(\\[dtc]?frac)\s*([0-9])\s*([0-9])"), r"\1{\2}{\3}"),
    (re.compile(r"\^\s*(?:\{\s*\\circ\s*\}|\\circ)"), "°"),
    (re.compile(r"\^\s*\{\s*([0-9]+)\s*\}"), r"^\1 "),
    (re.compile("²"), "^2 "),
    (re.compile("³"), "^3 "),
    (re.compile(r"\bper cent\b", re.IGNORECASE), "percent"),
]
_MARK = re.compile(r"\\[A-Za-z]+|\\[{}%$]|[<>]=|.", re.DOTALL)

_SAME_MARK = {
    **dict.fromkeys([r"\times", r"\cdot", r"\ast", r"\bullet", *"×·⋅∗•∙"], "*"),
    **dict.fromkeys([r"\div", "÷"], "/"),
    **dict.fromkeys(["−", "–"], "-"),
    **dict.fromkeys([r"\le", r"\leq", r"\leqslant", "≤"], "<="),
    **dict.fromkeys([r"\ge", r"\geq", r"\geqslant", "≥"], ">="),
    **dict.fromkeys([r"\lvert", r"\rvert", r"\vert", r"\mid"], "|"),
    **dict.fromkeys([r"\dfrac", r"\tfrac", r"\cfrac"], r"\frac"),
    **dict.fromkeys([r"\dbinom", r"\tbinom"], r"\binom"),
    **dict.fromkeys([r"\degree", "degrees", "degree"], "°"),
    **dict.fromkeys([r"\%", "％", "percent", "pct"], "%"),
    **dict.fromkeys(["dollars", "dollar"], r"\$"),
    **dict.fromkeys(["euros", "euro"], "€"),
    **{r"\lbrace": r"\{", r"\rbrace": r"\}", r"\lbrack": "[", r"\rbrack": "]"},
    **{r"\lt": "<", r"\gt": ">", r"\in": "∈", r"\cup": "∪", r"\pm": "±"},
    **{"π": r"\pi", "∞": r"\infty", "√": r"\sqrt"},
}
_OPENING, _CLOSING = ("(", "[", "{", r"\{"), (")", "]", "}", r"\}")


class Token(str):
    """What it says, and of what kind: "number", "word", "text" (a word in \\text{}) or "mark".

    Two tokens are equal if they say the same: cm is \\text{cm}.
    """

    def __new__(cls, says, kind):
        token = super().__new__(cls, says)
        token.kind = kind
        return token


def tokens(text):
    r"""The text as a list of tokens, without what only sets it: spacing, \left, $, \text, \boxed.

    A comma before three digits belongs to a number, but not within brackets: (1,234) is a pair.
    1.10.2024 and 1,05 are no numbers, but one mark each.
    """
    found = []
    opened = []  # per open brace: is it of "text", of another "wrapper", or does it "group"?
    depth = 0
    at = 0
    for written, plain in _REWRITTEN:
        text = written.sub(plain, text)
    while at < len(text):
        if ignored := _IGNORED.match(text, at):
            at = ignored.end()
            continue
        if wrapper := _WRAPPER.match(text, at):
            opened.append("text" if wrapper["text"] else "wrapper")
            at = wrapper.end()
            continue
        token, at = _token(text, at, is_text="text" in opened, in_brackets=depth > 0)
        if token == "{":
            opened.append("group")
        elif token == "}" and opened and opened.pop() != "group":
            continue
        depth += (token in _OPENING) - (token in _CLOSING)
        found.append(token)
    return found


def _token(text, at, is_text, in_brackets):
    """(the token that begins here, where the next one does)"""
    number = not in_brackets and _LONG_NUMBER.match(text, at)
    if not number:  # a date or the like, whose zeros count
        other = _DOTTED.match(text, at) or not in_brackets and _DECIMAL_COMMA.match(text, at)
        if other:
            return Token(re.sub(r"\b0+(?=[0-9]+\.)", "", other[0]), "mark"), other.end()
        number = _PLAIN_NUMBER.match(text, at)
    if number:
        return Token(_plain(re.sub(r"[^0-9.]", "", number[0])), "number"), number.end()
    if word := _WORD.match(text, at):
        mark = _SAME_MARK.get(word[0].lower())
        kind = "text" if is_text else "word"
        return Token(mark or word[0], "mark" if mark else kind), word.end()
    mark = _MARK.match(text, at)
    return Token(_SAME_MARK.get(mark[0], mark[0]), "mark"), mark.end()


def _plain(decimal):
    """016, 16.0 and 16 are 16; .50 is 0.5."""
    whole, _, rest = decimal.partition(".")
    whole, rest = whole.lstrip("0") or "0", rest.rstrip("0")
    return f"{whole}.{rest}" if rest else whole


# -------------------------------------------------------------------------------------- trees

_CONSTANTS = (r"\pi", r"\infty", "e", "i")
_GREEK = re.compile(
    r"\\(?:alpha|beta|[gG]amma|[dD]elta|(?:var)?epsilon|zeta|eta|[tT]heta|iota|kappa|[lL]ambda|mu|nu"
    r"|[xX]i|rho|[sS]igma|tau|[uU]psilon|(?:var)?phi|Phi|chi|[pP]si|[oO]mega)"
)
_FUNCTION = re.compile(r"\\?(?:(?:arc)?(?:sin|cos|tan)|cot|sec|csc|(?:sin|cos|tan)h|ln|log|exp)")
_BARS = {"|": "|", r"\lfloor": r"\rfloor", r"\lceil": r"\rceil"}  # brackets that are functions
RELATIONS = ("=", "<", ">", "<=", ">=", "∈")
_BRACKETS = {"(": (")", "]"), "[": (")", "]"), r"\{": (r"\}",), "{": ("}",)}
UNORDERED = ("{}", ",", "union")


def read_tree(words):
    """The tree of a list of tokens; Unreadable if there is none."""
    if words.count("±") == 1:
        at = words.index("±")
        signs = (Token(sign, "mark") for sign in "+-")
        return _several(",", [read_tree([*words[:at], sign, *words[at + 1 :]]) for sign in signs])
    reader = _Reader([letter for word in words for letter in _letters(word)])
    tree = _several(",", reader.items())
    if reader.next is not None:
        raise Unreadable(reader.next)
    return tree


def _letters(word):
    """Letters beside one another are factors: xy is x times y. The names of functions stay."""
    if word.kind != "word" or word in ("and", "or") or _FUNCTION.fullmatch(word):
        return [word]
    return [Token(letter, "word") for letter in word]


class _Reader:
    """Reads tokens from left to right: items of relations of sums of products of powers."""

    def __init__(self, words):
        self.words, self.at, self.depth = words, 0, 0

    @property
    def next(self):
        return self.words[self.at] if self.at < len(self.words) else None

    def take(self, *wanted):
        """The next token, if it is one of these, or else None."""
        if self.next is None or self.next not in wanted:
            return None
        self.at += 1
        return self.words[self.at - 1]

    def need(self, *wanted):
        taken = self.take(*wanted)
        if taken is None:
            raise Unreadable(f"{self.next} where {wanted} should be")
        return taken

    def items(self):
        """a, b and c"""
        items = [self.relation()]
        while self.take(",", "and", "or"):
            self.take("and", "or")  # a, b, and c
            items.append(self.relation())
        return items

    def relation(self):
        """a < b <= c, or one side alone"""
        sides = [self.union()]
        signs = []
        while sign := self.take(*RELATIONS):
            signs.append(sign)
            sides.append(self.union())
        if not signs:
            return sides[0]
        if set(signs) <= {">", ">="}:  # 2 > x is x < 2
            sides.reverse()
            signs = [sign.replace(">", "<") for sign in reversed(signs)]
        return ("relation", " ".join(signs), *sides)

    def union(self):
        parts = [self.sum()]
        while self.take("∪"):
            parts.append(self.sum())
        return _several("union", parts)

    def sum(self):
        terms = []
        sign = self.take("+", "-")
        while not terms or sign:
            term = self.product()
            terms.append(_negative(term) if sign == "-" else term)
            sign = self.take("+", "-")
        return _flat("sum", terms)

    def product(self):
        product = self.power()
        while True:
            if self.take("*"):
                product = _product(product, self.power())
            elif self.take("/"):
                product = _quotient(product, self.power())
            elif self.begins_factor():
                product = _product(product, self.power())
            else:
                return product

    def begins_factor(self):
        """Does a factor follow without a sign? A number never does: x2 and 1 6 are nothing."""
        word = self.next
        if word is None or word in ("and", "or") or word.kind in ("number", "text"):
            return False
        is_command = word in (r"\frac", r"\sqrt", r"\binom", r"\lfloor", r"\lceil")
        is_name = word in _CONSTANTS or _GREEK.fullmatch(word) or _FUNCTION.fullmatch(word)
        return word.kind == "word" or is_command or is_name or word in ("(", "{")

    def power(self):
        """A power, a factorial, degrees; of each only one, as LaTeX has no a^b^c."""
        tree = self.primary()
        if self.take("^"):
            tree = ("power", _single(tree), self.argument())
        for mark in ("!", "°"):
            if self.take(mark):
                tree = ("call", mark, _single(tree))
        return tree

    def primary(self):
        self.depth += 1
        if self.depth > MAX_DEPTH or self.next is None:
            raise Unreadable("too deep" if self.next else "the end")
        word = self.next
        if word.kind == "number":
            tree = self.number()
        elif _FUNCTION.fullmatch(word):
            tree = self.function()
        elif word.isalpha() and len(word) == 1 or word in _CONSTANTS or _GREEK.fullmatch(word):
            tree = self.name()
        elif self.take(r"\frac"):
            tree = _quotient(self.argument(), self.argument())
        elif self.take(r"\binom"):
            tree = ("call", r"\binom", self.argument(), self.argument())
        elif self.take(r"\sqrt"):
            index = self.inside("[", "]") if self.next == "[" else ("number", "2")
            tree = ("root", index, self.argument())
        elif word in _BARS:
            tree = ("call", word, self.inside(word, _BARS[word]))
        elif word in _BRACKETS:
            tree = self.bracketed()
        else:
            raise Unreadable(word)
        self.depth -= 1
        return tree

    def number(self):
        """12, 0.5, or a mixed number: 1\frac{1}{2}, 1 1/2"""
        whole = self.plain_number()
        at = self.at
        if "." not in whole[1]:
            part = self.primary() if self.next == r"\frac" else self.plain_fraction()
            if part and part[0] == "number" and 0 < number(part) < 1:
                return ("number", f"{whole[1]} {part[1]}")
        self.at = at
        return whole

    def plain_number(self):
        digits = self.need(self.next)
        if len(digits) > MAX_DIGITS:
            raise Unreadable("a number too long")
        return ("number", str(digits))

    def plain_fraction(self):
        """1/2, or None where no such words follow."""
        words = self.words[self.at : self.at + 3]
        if len(words) < 3 or (words[0].kind, words[1], words[2].kind) != ("number", "/", "number"):
            return None
        top, _, bottom = self.plain_number(), self.take("/"), self.plain_number()
        return _quotient(top, bottom)

    def name(self):
        """x, or x_1"""
        word = self.need(self.next)
        if self.take("_"):
            return ("symbol", f"{word}_{{{self.need(self.next)}}}")
        return ("constant" if word in _CONSTANTS else "symbol", str(word))

    def function(self):
        r"""\sin x, \sin^2 x, \log_2(x)"""
        name = "\\" + self.need(self.next).lstrip("\\")
        base = [self.argument()] if self.take("_") else []
        power = self.argument() if self.take("^") else None
        argument = _single(self.power())
        while self.begins_factor() and not _FUNCTION.fullmatch(self.next):  # \sin 2x
            argument = _product(argument, self.power())
        call = ("call", name, *base, argument)
        return call if power is None else ("power", call, power)

    def argument(self):
        r"""What a command or a ^ is given: {...}, one number or name, a negative number."""
        if self.take("-"):
            return _negative(self.argument())
        if self.next is not None and self.next.kind == "number":  # x^2\frac{1}{2} is x^2 * 1/2
            return self.plain_number()
        return _single(self.primary())

    def inside(self, opening, closing):
        self.need(opening)
        items = self.items()
        self.need(closing)
        return _several(",", items)

    def bracketed(self):
        """(a) groups, as {a} does; all else in brackets is a list."""
        opening = self.need(*_BRACKETS)
        items = self.items()
        brackets = opening + self.need(*_BRACKETS[opening])
        if opening == "{" or (brackets == "()" and len(items) == 1):
            return _several(",", items)
        return _list(brackets.replace("\\", ""), items)


def _several(kind, items):
    return items[0] if len(items) == 1 else _list(kind, items)


def _list(kind, items):
    return ("list", kind, *(sorted(items, key=repr) if kind in UNORDERED else items))


def _single(tree):
    """The tree, which an operation is to be done with: so it may not be a list or a relation."""
    if tree[0] in ("list", "relation"):
        raise Unreadable(tree)
    return tree


def _flat(kind, members):
    """A sum or a product, without sums in the sum or products in the product."""
    if len(members) == 1:
        return members[0]
    flat = []
    for member in members:
        flat += _single(member)[1:] if member[0] == kind else [member]
    return (kind, *sorted(flat, key=repr))


def _product(left, right):
    """Of quotients it is one quotient: 2 * x/3 is 2x/3."""
    top, bottom = zip(_parts(left), _parts(right), strict=True)
    below = [part for part in bottom if part is not None]
    product = _flat("product", list(top))
    return ("quotient", product, _flat("product", below)) if below else product


def _parts(tree):
    return tree[1:] if _single(tree)[0] == "quotient" else (tree, None)


def _quotient(top, bottom):
    """Of two whole numbers it is a number: 3/4."""
    _single(top), _single(bottom)
    is_fraction = _is_whole(top) and _is_whole(bottom) and number(bottom) > 0
    if is_fraction:
        return ("number", f"{top[1]}/{bottom[1]}")
    if top[0] == "quotient":
        return ("quotient", top[1], _flat("product", [top[2], bottom]))
    return ("quotient", top, bottom)


def _negative(tree):
    """-5 is a number, -2x the product of -2 and x; but -(-5) is not worked out yet."""
    _single(tree)
    if tree[0] == "number" and not tree[1].startswith("-"):
        return ("number", "-" + tree[1])
    if tree[0] == "quotient":
        return ("quotient", _negative(tree[1]), tree[2])
    if tree[0] == "product":
        for member in tree[1:]:
            if member[0] == "number" and not member[1].startswith("-"):
                others = list(tree[1:])
                others.remove(member)
                return _flat("product", [_negative(member), *others])
    return _flat("product", [("number", "-1"), tree])


# ---------------------------------------------------------------------------- what a tree holds


def number(tree):
    """The value of a number's tree, as a Fraction."""
    sign = -1 if tree[1].startswith("-") else 1
    return sign * sum(Fraction(part) for part in tree[1].lstrip("-").split())


def subtrees(tree):
    """The tree and all in it."""
    found = [tree]
    for member in tree[1:]:
        if isinstance(member, tuple):
            found += subtrees(member)
    return found


def symbols(tree):
    """The letters whose value is open."""
    return {part[1] for part in subtrees(tree) if part[0] == "symbol"}


def by_value(tree):
    """The same with the values of numbers in place of how they were written."""
    if tree[0] == "number":
        return ("number", number(tree))
    members = [by_value(part) if isinstance(part, tuple) else part for part in tree[1:]]
    if tree[0] == "list":
        return _list(members[0], members[1:])
    return (tree[0], *(sorted(members, key=repr) if tree[0] in ("sum", "product") else members))


def exact(tree):
    r"""A value as exact multiples: {"1": 2, r"\sqrt{5}": 3} of 2+3\sqrt5. None of anything else
    (letters, products of roots), and where the numbers grow too large to be worked out."""
    kind, *members = tree
    if kind == "number":
        return {"1": number(tree)}
    if kind == "constant" or (kind == "root" and not symbols(tree)):
        return {to_latex(tree): Fraction(1)}
    if kind not in ("sum", "product", "quotient", "power"):
        return None
    values = [exact(member) for member in members]
    if None in values:
        return None
    if kind == "sum":
        worked = _exact_sum(values)
    elif kind == "product":
        worked = _exact_product(values)
    else:  # by a number, and of numbers
        top, bottom = values[0], _rational(values[1])
        worked = _exact_quotient(top, bottom) if kind == "quotient" else _exact_power(top, bottom)
    if worked is None or any(_bits(factor) > MAX_BITS for factor in worked.values()):
        return None
    return worked


def _rational(multiples):
    """The Fraction that it is, or None."""
    return multiples["1"] if multiples.keys() == {"1"} else None


def _exact_sum(terms):
    total = {}
    for term in terms:
        for key, factor in term.items():
            total[key] = total.get(key, 0) + factor
    return total


def _exact_product(factors):
    others = [factor for factor in factors if _rational(factor) is None]
    if len(others) > 1:
        return None
    times = math.prod(factor["1"] for factor in factors if _rational(factor) is not None)
    return {key: times * factor for key, factor in (others or [{"1": Fraction(1)}])[0].items()}


def _exact_quotient(top, bottom):
    return {key: factor / bottom for key, factor in top.items()} if bottom else None


def _exact_power(top, exponent):
    base = _rational(top)
    if base is None or exponent is None or exponent.denominator > 1:
        return None
    is_zero_below = base == 0 and exponent <= 0
    if is_zero_below or _bits(base) * abs(exponent) > MAX_BITS:
        return None
    return {"1": base ** int(exponent)}


def about(tree):
    """The value as a float, or None: of letters, calls, lists and i, and of too large numbers."""
    try:
        value = _about(tree)
    except (KeyError, OverflowError, ZeroDivisionError):
        return None
    return value if isinstance(value, float) and math.isfinite(value) else None


_FLOATS = {"\\pi": math.pi, "e": math.e}


def _about(tree):
    kind, *members = tree
    if kind == "number":
        return float(number(tree))
    if kind == "constant":
        return _FLOATS[members[0]]
    if kind not in ("sum", "product", "quotient", "power", "root"):
        raise KeyError(kind)
    values = [_about(member) for member in members]
    if kind == "sum":
        return sum(values)
    if kind == "product":
        return math.prod(values)
    left, right = values
    if kind == "quotient":
        return left / right
    return left**right if kind == "power" else right ** (1 / left)  # complex below 0


def _bits(value):
    return value.numerator.bit_length() + value.denominator.bit_length()


def joins_numbers(tree):
    """Does it hold two plain numbers with a sign between them, as dates do, scores and sizes?"""
    return any(
        part[0] in ("sum", "product", "quotient")
        and sum(member[0] == "number" for member in part[1:]) > 1
        for part in subtrees(tree)
    )


def to_latex(tree):
    """Plain LaTeX of a tree without lists."""
    kind, *members = tree
    if kind == "number":
        value = number(tree)
        if "." in tree[1] or value.denominator == 1:
            return tree[1] if "/" not in tree[1] else str(value)
        return rf"\frac{{{value.numerator}}}{{{value.denominator}}}"
    if kind in ("symbol", "constant"):
        return members[0] + " "
    if kind == "call":
        return _call_to_latex(*members)
    written = [to_latex(member) for member in members if isinstance(member, tuple)]
    if kind == "quotient":
        return r"\frac{{{}}}{{{}}}".format(*written)
    if kind == "root":
        return (
            r"\sqrt[{}]{{{}}}".format(*written) if written[0] != "2" else rf"\sqrt{{{written[1]}}}"
        )
    if kind == "power":
        return "({})^{{{}}}".format(*written)
    if kind == "relation":
        return members[0].join(written)
    sign = "+" if kind == "sum" else r"\cdot "
    return sign.join(f"({member})" for member in written)


def _call_to_latex(name, *arguments):
    written = [to_latex(argument) for argument in arguments]
    if name in _BARS:
        left, right = (r"\left|", r"\right|") if name == "|" else (name, _BARS[name])
        return f"{left} {written[0]} {right}"
    if name in ("!", "°"):
        return f"({written[0]})" + name.replace("°", r"^\circ ")
    if name == r"\binom":
        return r"\binom{{{}}}{{{}}}".format(*written)
    base = f"_{{{written[0]}}}" if len(written) == 2 else ""
    return f"{name}{base}({written[-1]})"


# --------------------------------------------------------------------------------- normal form


def is_worked(tree, known=()):
    r"""Is it a value in its normal form, or what else may be an answer as it stands?

    number    a decimal, or a fraction in lowest terms that is no whole number
    sum       no two members alike: not 2 + 3, nor \pi + 2\pi
    product   the same: not 3 * 5, nor \sqrt2 \sqrt3, nor x x
              where there are no letters, a sum is in no other sum, and not multiplied by one
    quotient  the numbers above and below have no common factor, and nothing is above and below
    power     of e and \pi; of numbers not: 2^{10} is 1024
    root      of a whole number without a square in it (for a cube root: a cube)
    call      not of values: \ln 2, |3-8| and 10! are work to be done; \ln x is not

    All in it has to be so, too. Letters are let be where nothing is known of them: (x+1)^2 is
    worked. And so is what is `known`, because the true answer leaves it as it is: \ln 2.
    """
    if tree in known and tree[0] != "number":
        return True
    kind, *members = tree
    inner = [member for member in members if isinstance(member, tuple)]
    if not all(is_worked(member, known) for member in inner):
        return False
    if not _is_expanded(tree):
        return False
    if kind == "number":
        return _is_lowest(tree)
    if kind == "sum":
        return _differ([_without_numbers(term) for term in inner]) and ("number", "0") not in inner
    if kind == "product":
        is_trivial = ("number", "0") in inner or ("number", "1") in inner
        return _differ(_bases(tree)) and not is_trivial
    if kind == "quotient":
        return _is_lowest_quotient(*inner)
    if kind == "power":
        base, exponent = inner
        is_left = base in (("constant", "e"), ("constant", r"\pi")) and exponent[0] == "number"
        return bool(symbols(tree)) or (is_left and number(exponent) not in (0, 1))
    if kind == "root":
        return _is_lowest_root(*inner)
    if kind == "call" and members[0] != "°":
        return bool(symbols(tree))
    return True


def _is_expanded(tree):
    r"""A value has no sum within a sum, and of sums no product: \sqrt2 - (\sqrt2 - 16) is 16."""
    if tree[0] not in ("sum", "product", "quotient") or symbols(tree):
        return True
    members = tree[1:] if tree[0] == "sum" else [tree]
    sums = [base for member in members for base in _bases(member) if base[0] == "sum"]
    return len(sums) <= (0 if tree[0] == "sum" else 1)


def _differ(keys):
    return len(set(keys)) == len(keys)


def _is_whole(tree):
    return tree[0] == "number" and tree[1].lstrip("-").isdecimal()


def _is_lowest(tree):
    fraction = tree[1].rpartition(" ")[2].lstrip("-")
    if "/" not in fraction:
        return True
    value = Fraction(fraction)
    return value.denominator > 1 and fraction == str(value)


def _is_lowest_quotient(top, bottom):
    above, below = _content(top), _content(bottom)
    if above.denominator > 1 or below.denominator > 1 or math.gcd(int(above), int(below)) != 1:
        return False
    if bottom[0] == "number" and (top[0] == "number" or number(bottom) <= 1):
        return False  # 1.5/3, x/1
    return _differ([base for base in _bases(top) + _bases(bottom) if base != "number"])


def _is_lowest_root(index, radicand):
    if not _is_whole(index) or not 2 <= number(index) <= 10:
        return bool(symbols(index))
    if radicand[0] == "number" and not (_is_whole(radicand) and number(radicand) > 1):
        return False
    if radicand[0] != "number" and _rational(exact(radicand) or {}) is not None:
        return False  # \sqrt{10^4}
    content = _content(radicand)
    if content.denominator > 1:
        return bool(symbols(radicand))
    degree, whole = int(number(index)), int(content)
    if whole > MAX_RADICAND:
        return False
    largest = math.ceil(whole ** (1 / degree)) + 1
    return all(whole % divisor**degree for divisor in range(2, largest + 1))


def _content(tree):
    """The number that can be taken out of it, without its sign: 2 of 4x+6."""
    kind, *members = tree
    if kind == "number":
        return abs(number(tree))
    if kind == "product":
        return math.prod(_content(member) for member in members)
    if kind == "quotient":
        return _content(members[0]) / (_content(members[1]) or 1)
    if kind == "sum":
        contents = [_content(member) for member in members]
        broken = [content for content in contents if content.denominator > 1]
        return broken[0] if broken else Fraction(math.gcd(*map(int, contents)))
    return Fraction(1)


def _without_numbers(tree):
    """What terms have in common that can be added up: x, of 2x and of x/3."""
    if tree[0] == "number":
        return ()
    if tree[0] == "product":
        return tuple(member for member in tree[1:] if member[0] != "number")
    if tree[0] == "quotient":
        below = _without_numbers(tree[2])
        return ("over", _without_numbers(tree[1]), below) if below else _without_numbers(tree[1])
    return (tree,)


def _bases(tree):
    """What is multiplied in it. All numbers count as one, as do all roots of numbers."""
    if tree[0] in ("product", "quotient"):
        return [base for member in tree[1:] for base in _bases(member)]
    if tree[0] == "power":
        return [tree[1]]
    if tree[0] == "root" and not symbols(tree):
        return [tree[:2]]
    return ["number"] if tree[0] == "number" else [tree]
