"""Rewrite what can be spelled in several ways as one: signs, LaTeX's spaces, currencies, fractions, degrees, dates."""

import re
import unicodedata

_SUPERSCRIPTS = str.maketrans("⁺⁻⁰¹²³⁴⁵⁶⁷⁸⁹", "+-0123456789")
_CHARACTERS = {
    "\u2212": "-", "\u2010": "-", "\u2011": "-", "\u2014": "\u2013", "\u2044": "/", "\u2215": "/", "\u00d7": "*", "\u00b7": "*",
    "\u22c5": "*", "\u2219": "*", "\u00f7": "/", "\u221a": r"\sqrt ", "\u03c0": r"\pi ", "\u221e": r"\infty ", "\u00b0": r"\degree ",
    "\u00b1": r"\pm ", "\u2260": r"\ne ", "\u2248": "=", "\u2243": "=", "\u2192": r"\then ", "\u21d2": r"\then ", "\u2264": r"\le ", "\u2265": r"\ge ",
    "\u2026": "...", "\u2019": "'", "\u2022": r"\then ", "\u20ac": "$", "\u00a3": "$", "\u00a5": "$", "\u20b9": "$", "\u00a2": "$",
}  # fmt: skip
_MONTH = (
    r"(?:(?:January|February|March|April|May|June|July|August|September|October|November|December)\b"
    r"|(?:Jan|Feb|Mar|Apr|Jun|Jul|Aug|Sept?|Oct|Nov|Dec)\b\.?)"
)
_NOT_A_LETTER = r"(?![a-zA-Z])"
_REWRITES: list[tuple[re.Pattern, str]] = [
    (re.compile(pattern), by)
    for pattern, by in (
        (r"<<[^<>]*>>", ""),  # GSM8K's calculator annotations
        (r"</?[a-zA-Z][^<>]{0,80}>", " "),
        (r"\\\\(?=[a-zA-Z])", r"\\"),
        (r"\\n(?![a-zA-Z])", "\n"),  # a line end that was escaped
        (r"(?<=[\d)])\*\*(?=\d|\(\d|-\d)", "^"),
        (r"\*\*+|__+|`", ""),  # Markdown
        (r",\\!\s*", ","),
        (r"\{,\}", ","),
        (r"\\!", ""),
        (r"!(?=\s*(?:\$|\\\)|\\\]))", r"\\factorial "),
        (rf"\\[,;:> ]|~|\\q?quad{_NOT_A_LETTER}|\\[()\[\]]", " "),
        (rf"\\(?:left|right|[bB]igg?[lr]?|displaystyle|textstyle|limits){_NOT_A_LETTER}", ""),
        (rf"\\(?:bf|rm){_NOT_A_LETTER}|\\f?boxed{_NOT_A_LETTER}", " "),  # a box here was never finished
        (r"(?<=\d)\s?\^\s?\{?\s?(?:\\(?:text|textrm|mathrm)\s?\{)?\s?(st|nd|rd|th)\b\s?\}{0,2}", r"\1"),
        (r"(?i)\b(?:half|quarter) (?:past|to|after) \d{1,2}\b", r"\\unclear "),
        (rf"\\[dtc]frac{_NOT_A_LETTER}", r"\\frac"),
        (rf"\^\s*(?:\{{\s*\\circ\s*\}}|\\circ{_NOT_A_LETTER})", r"\\degree "),
        (rf"\\(?:approx|simeq|doteq){_NOT_A_LETTER}", "="),
        (rf"\\(?:times|cdot|ast){_NOT_A_LETTER}", "*"),
        (rf"\\div{_NOT_A_LETTER}", "/"),
        (r"\bequals\b", "="),
        (rf"-{{1,2}}>|={{1,2}}>|\\(?:[Rr]ightarrow|Longrightarrow|implies|therefore|to){_NOT_A_LETTER}", r"\\then "),
        (r"\\([$%#&_])", r"\1"),
        (r"(?<=\d)\s?[xX]\s?(?=10\s?\^)", "*"),
        (r"(\$\s?\d[\d.,]*)\s?(?:[kKmMbB]|[mb]n|[MB]N)\b", r"\1\\unclear "),  # $5m: is it millions?
        # "1 1/2 million", "half a million", "1.2 lakh": what the word multiplies is not read, and without it the number is another
        (
            r"(?i)(/\s?\d+|\\frac\s?\{\d+\}\s?\{\d+\}|\bhalf (?:an? )?)\s?(?:hundred|thousand|[mbtr]+illion)s?\b",
            r"\1\\unclear ",
        ),
        (r"(?i)(?<=\d)(?:-(?:hundred|thousand|[mbtr]+illion)|[ -]?(?:lakh|crore|mln|bn))s?\b", r"\\unclear "),
        (r"(?i)(?<=\d)\s?(?:[ap]\.?\s?m\b|o'clock\b)", r"\\unclear "),
        (
            rf"{_MONTH} \d{{1,2}}(?:st|nd|rd|th)?,? \d{{4}}\b|{_MONTH} (?:\d{{1,2}}(?:st|nd|rd|th)?|\d{{4}})\b(?! [a-z])",
            r"\\unclear ",
        ),
        (rf"\b\d{{1,2}}(?:st|nd|rd|th)? (?:of )?{_MONTH}(?:,? \d{{4}}\b)?", r"\\unclear "),
        (rf"(?<=\.\d)(\d*)\s?(?:\\[cl]?dots{_NOT_A_LETTER}|\.\.+)", r"\1\\unclear "),  # 0.333...
        (rf"\\[cl]?dots{_NOT_A_LETTER}", " ... "),
        (r"(?<![A-Za-z\\])[A-Z]{1,3}\$", "$"),  # US$
        (r"\$", ""),
    )
]
_REPEATING = re.compile(r"(?<!\d)(\d{0,30})\.(\d{0,30})\\(?:overline|bar)\s?\{(\d{1,30})\}")
_TEXT = re.compile(
    r"(?P<text>\\(?:text(?:rm|bf|it|sf|tt|normal|up)?|mbox|hbox|emph|underline)\s*\{)"
    r"|(?P<font>\\(?:mathrm|mathbf|mathit|mathsf|operatorname|boldsymbol)\s*\{)|\\[{}]|[{}]"
)
OPEN, CLOSE = "\ue000", "\ue001"  # around the content of \text{...}


def plain(text: str) -> str:
    """Rewrite the text so that signs, LaTeX's spaces, currencies, fractions, degrees and dates have one spelling."""
    text = text.replace(OPEN, "").replace(CLOSE, "")
    if not text.isascii():
        text = re.sub(r"(^|[=(:\n])\s?\u2212\s?", r"\1-", text)  # never a bullet
        text = re.sub("[⁺⁻⁰¹²³⁴-⁹]+", lambda m: "^{" + m[0].translate(_SUPERSCRIPTS) + "}", text)
        text = "".join(c if c.isascii() else _character(c) for c in text)
    for pattern, by in _REWRITES:
        text = pattern.sub(by, text)
    return _upright(_REPEATING.sub(_repeating, text))


def _character(c: str) -> str:
    """Return the ASCII spelling of a character, or the character."""
    if c in _CHARACTERS:
        return _CHARACTERS[c]
    category = unicodedata.category(c)
    if category == "Nd":
        return str(unicodedata.decimal(c))
    if category == "Zs":
        return " "
    if category == "Cf":
        return ""
    spelled = unicodedata.normalize("NFKC", c)
    above, stroke, below = spelled.partition("\u2044")
    if stroke and above.isdigit() and below.isdigit():
        return rf"\frac{{{above}}}{{{below}}}"
    return spelled if "\uff01" <= c <= "\uff5e" else c


def _repeating(match: re.Match) -> str:
    r"""Write a repeating decimal as a fraction: 0.1\overline{6} -> \frac{15}{90}."""
    integer, once, again = match[1], match[2], match[3]
    above = int(integer + once + again) - int(integer + once or "0")
    return rf"\frac{{{above}}}{{{(10 ** len(again) - 1) * 10 ** len(once)}}}"


def _upright(text: str) -> str:
    r"""Put the content of each \text{...} between OPEN and CLOSE, and remove the braces of fonts."""
    parts: list[str] = []
    stack: list[str] = []
    last = 0
    for match in _TEXT.finditer(text):
        if match[0] in (r"\{", r"\}"):
            continue
        parts.append(text[last : match.start()])
        last = match.end()
        if match[0] == "}":
            closed = stack.pop() if stack else "brace"
            parts.append({"text": CLOSE, "font": ""}.get(closed, "}"))
        else:
            inner = "font" if stack and stack[-1] != "brace" else "brace"  # braces inside a text have no meaning
            stack.append(match.lastgroup or inner)
            parts.append({"text": OPEN, "font": ""}.get(stack[-1], "{"))
    return "".join([*parts, text[last:]])
