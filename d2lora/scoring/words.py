"""Split texts of any script into words."""

import re
import unicodedata

# Vowel signs and tone marks in the scripts of India and South-East Asia are part of a word, but \w does not match them.
SIGNS = "".join(
    chr(c) for c in (*range(0x900, 0x10A0), *range(0x1780, 0x1800)) if unicodedata.category(chr(c)) in ("Mn", "Mc")
)
# Thai, Lao, Tibetan, Burmese, Khmer, Japanese, Chinese: no spaces between words.
UNSPACED = re.compile(
    "[\u0e00-\u0fff\u1000-\u109f\u1780-\u17ff\u3005-\u3007\u3040-\u312f\u31a0-\u31bf\u31f0-\u31ff"
    f"\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U000323af][{SIGNS}]*"
)
_BETWEEN = re.compile(rf"[^\w{SIGNS}]|_")


def words(text: str) -> list[str]:
    """Return the words of a text, lower-cased, in which letters and digits of every script count.

    In scripts without spaces between words, each character is a word. Accents stay, optional vowel points (Arabic, Hebrew)
    go, and other forms of a character (full width, ligatures) are the plain one. Of an ASCII text these are the words that
    rouge-score reads.
    """
    plain = text.lower() if text.isascii() else _plain(text)
    return UNSPACED.sub(r" \g<0> ", _BETWEEN.sub(" ", plain)).split()


def _plain(text: str) -> str:
    """Return a text in lower case, normalized (NFKC), without invisible characters and optional marks."""
    lower = unicodedata.normalize("NFKC", text).lower()
    return "".join(c for c in lower if c in SIGNS or unicodedata.category(c) not in ("Mn", "Cf"))
