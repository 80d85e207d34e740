"""Whatever rows hold: trained on exactly what a plain rendering of the row says, or refused with its row, or counted.

The oracles here read rows by docs/data.md, docs/templates.md and docs/answers.md, in a few plain lines of their own.
"""

import copy
import functools
import itertools
import json
import math
import re
import unicodedata
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from d2lora import data
from d2lora.data.pairs import EMPTY, EQUAL, PARTED
from d2lora.data.tokens import BAD
from d2lora.errors import UserError
from d2lora.evaluate.harness import task_of
from d2lora.scoring import answers
from d2lora.scoring.rouge import rouge
from d2lora.settings import Benchmark, Data, Task, Warmup


def seen(text: str) -> bool:
    """Whether a text shows anything: more than white space, control characters and what has no width."""
    return any(not c.isspace() and unicodedata.category(c) not in ("Cc", "Cf") for c in text)


ROOT = Path(__file__).parents[2]
MANY = {"deadline": None, "derandomize": True, "suppress_health_check": list(HealthCheck)}
FILES = itertools.count()


@functools.cache
def lab():
    """The lab's tokenizer; no fixture, which hypothesis would print with every case that fails."""
    return AutoTokenizer.from_pretrained(ROOT / "d2lora/lab/base")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("rows")


def write(folder: Path, rows: list[dict]) -> Path:
    """A new file: one of the same name, size and instant is taken for the old one."""
    file = folder / f"{next(FILES)}.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


# --- values --------------------------------------------------------------------------------------------------------

OWN_TOKENS = re.compile(r"<\|(?:begin|end|user|assistant|system|pad)\|>")
NAMED = ["An apple.", 'red, maybe "blue",green', "a\nb\r\n\u2028c", "Ünï 漢字 🙂", "None", "nan", "[{'role': 'user'}]", "{q} {}", " padded\n",
         "The answer is \\boxed{4}.", "<think>Hm.</think> A pear.", "<|other|>", "word " * 60]  # fmt: skip
TEXTS = st.sampled_from(NAMED) | st.text(min_size=1, max_size=8).filter(str.strip)
PARTS = st.lists(TEXTS.map(lambda text: {"type": "text", "text": text}), min_size=1, max_size=2)
NUMBERS = st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.sampled_from([0, -0.0, 1e22, 10**30])
GOOD = TEXTS | TEXTS | NUMBERS | PARTS
CARRIED = st.sampled_from(["<|end|>", "x<|user|>", "<|begin|>y", "<|pad|>", "a<|assistant|>b"])
NOTHING = st.sampled_from([None, "", " \n\t"])
NO_TEXT = st.sampled_from([True, False, math.nan, math.inf, [], {}, ["a"], [None], [[]], {"text": "a"}, [{"type": "image"}], "\ud800"]) | st.lists(
    st.sampled_from([{"type": "text", "text": "a"}, {"type": "text"}, {"type": "image", "text": "a"}, "a", None]), min_size=2, max_size=3
).filter(lambda parts: not all(isinstance(p, dict) and p.get("type") == "text" and "text" in p for p in parts))  # fmt: skip
MISSING = object()


def plain(value: object) -> str | None:
    """The text that a value is; None where it is none."""
    if isinstance(value, bool) or value is None:
        return None
    if isinstance(value, str):
        return None if any("\ud800" <= c <= "\udfff" for c in value) else value
    if isinstance(value, int | float):
        return json.dumps(value) if math.isfinite(value) else None
    if isinstance(value, list) and value and all(isinstance(p, dict) and p.get("type") == "text" for p in value):
        texts = [p.get("text") for p in value]
        return "".join(texts) if all(isinstance(text, str) for text in texts) else None
    return None


# --- tables of a task ------------------------------------------------------------------------------------------------

ROLES = {"user": "human", "assistant": "gpt", "system": "system"}


def turn(role: str, content: object, names: tuple[str, str]) -> dict:
    """A turn as chat APIs have it, or ShareGPT."""
    return {names[0]: ROLES.get(role, role) if names[0] == "from" else role, names[1]: content}


@st.composite
def histories(draw, names: tuple[str, str]) -> list[dict]:
    roles = draw(st.sampled_from([["user"], ["user"], ["system", "user"], ["user", "assistant", "user"]]))
    return [turn(role, draw(TEXTS | PARTS), names) for role in roles]


@st.composite
def told_off(draw, history: list[dict], names: tuple[str, str]) -> list[dict]:
    """A conversation with something odd in it: a role, a content, a turn too many or too few."""
    turns = copy.deepcopy(history)
    odd = draw(st.integers(0, 4))
    if odd == 0:
        turns = turns[:-1]
    elif odd == 1:
        turns.append(turn(draw(st.sampled_from(["user", "assistant", "system"])), draw(TEXTS), names))
    elif odd == 2 and turns:
        turns[draw(st.integers(0, len(turns) - 1))][names[0]] = draw(
            st.sampled_from(["narrator", None, "system", "tool", 3])
        )
    elif turns:
        turns[draw(st.integers(0, len(turns) - 1))][names[1]] = draw(NOTHING | NO_TEXT | CARRIED)
    return turns  # fmt: skip


@st.composite
def tables(draw) -> tuple[list[dict], dict]:
    """Rows of one layout, of which some are odd, and a task over them."""
    layout = draw(st.sampled_from(["texts", "texts", "implicit", "repeated", "explicit", "whole", "history", "turns"]))
    names = draw(st.sampled_from([("role", "content"), ("role", "content"), ("from", "value")]))
    rows = [draw(row_of(layout, names)) for _ in range(draw(st.integers(1, 5)))]
    for _ in range(draw(st.sampled_from([0, 0, 1, 1, 2, 3]))):
        row, column = draw(st.sampled_from(rows)), draw(st.sampled_from(["q", "good", "bad", "start", "more"]))
        value = draw(NOTHING | NO_TEXT | CARRIED | GOOD | histories(names) | st.just(MISSING))
        talk = row.get(column)
        if isinstance(talk, list) and all(isinstance(t, dict) and names[0] in t for t in talk) and draw(st.booleans()):
            value = draw(told_off(row[column], names))
        row[column] = value
        if value is MISSING:
            del row[column]
    prompts = {
        "texts": st.sampled_from(["{q}", "Q: {q}\nA:", "{q} {start}", "{q!s}", "{q[0]}", "{q[text]}", "Name a fruit."]),
        "implicit": st.none(),
        "turns": st.sampled_from([[{"role": "system", "content": "Be brief."}, {"role": "user", "content": "{q}"}]]),
    }
    task = {
        "prompt": draw(prompts.get(layout, st.just("{q}"))),
        "prefix": draw(st.sampled_from(["", "", "", "So: ", "{start}"])),
        "chosen": "{good}",
        "rejected": draw(st.sampled_from(["{bad}", "{bad}", None])),
        "full_chosen": draw(st.sampled_from([None, None, None, "{more}", "{good} {more}"])) if layout == "texts" else None,
        "continuation": draw(st.sampled_from(["step", "rest"])),
        "rendered": layout == "texts" and draw(st.sampled_from([False, False, True])),
        "empty": draw(st.sampled_from(["refuse", "leave_out"])),
    }  # fmt: skip
    if task["rejected"] and task["full_chosen"]:
        task["full_rejected"] = draw(st.sampled_from([None, "{bad} {more}"]))
    return rows, task


@st.composite
def row_of(draw, layout: str, names: tuple[str, str]) -> dict:
    row = {"q": draw(GOOD), "good": draw(GOOD), "bad": draw(GOOD), "start": draw(GOOD), "more": draw(GOOD)}
    if layout in ("texts", "turns"):
        return row
    history = draw(histories(names))
    if layout != "history":
        before = [] if layout == "explicit" else history
        row |= {name: [*copy.deepcopy(before), turn("assistant", draw(GOOD), names)] for name in ("good", "bad")}
    if layout == "repeated":
        row["q"] = history[-1][names[1]]
    elif layout != "implicit":
        row["q"] = history
    return row


# --- what a row of a task says, read plainly -------------------------------------------------------------------------

FIELD = re.compile(r"\{(\w+)(?:\[(\w+)\])?(?:!s)?\}")


class Reading:
    """What a row says under a task: `sequences` {name: text}; or its `problems`, of which one is enough."""

    def __init__(self, task: dict, row: dict) -> None:
        self.task, self.row, self.problems, self.late, self.same = task, row, set(), False, False
        chosen, rejected = task["chosen"], task["rejected"]
        pairs = [("chosen", chosen, task["full_chosen"] or chosen)]
        pairs += [("rejected", rejected, task.get("full_rejected") or rejected)] if rejected else []
        read = {name: (self.answer(step), self.answer(full)) for name, step, full in pairs}
        befores = [before for both in read.values() for before, _ in both if before]
        if any(before != befores[0] for before in befores):
            self.problems.add(PARTED)
        messages = self.prompt(befores[0] if befores else [])
        prefix = self.text(task["prefix"], blank=True)
        self.sequences: dict[str, str] = {}
        if not self.problems:
            self.render(messages, prefix, {n: (step, full) for n, ((_, step), (_, full)) in read.items()})

    def text(self, template: str, blank: bool = False) -> str:
        filled, last, texts = "", 0, []
        for field in FIELD.finditer(template):
            value = self.row[field[1]]
            if (key := field[2]) is not None:
                known = isinstance(value, dict) and key in value
                known = known or (isinstance(value, list) and key.isdigit() and int(key) < len(value))
                if not known:
                    self.problems.add("refused")
                    return ""
                value = value[int(key)] if isinstance(value, list) else value[key]
            texts.append(self.value(value))
            filled += template[last : field.start()] + texts[-1]
            last = field.end()
        if not blank and (texts or not filled) and last and not any(seen(text) for text in texts):
            self.problems.add(EMPTY)
        return filled + template[last:]

    def value(self, value: object) -> str:
        text = plain(value)
        if text is None:
            self.problems.add(EMPTY if value is None else "refused")
        return text or ""

    def turns(self, template: str | None) -> list[tuple[str, str]] | None:
        """(role, text) of a column's conversation; None where it holds none."""
        field = FIELD.fullmatch(template or "")
        value = self.row[field[1]] if field and not field[2] and "!" not in template else None
        if not isinstance(value, list) or not value or not all(isinstance(t, dict) for t in value):
            return None
        if not all("role" in t or "from" in t for t in value):
            return None
        return [self.turn(t) for t in value]

    def turn(self, given: dict) -> tuple[str, str]:
        role = given.get("role", given.get("from"))
        role = {"human": "user", "gpt": "assistant"}.get(role, role) if isinstance(role, str) else role
        if role not in ("system", "user", "assistant", "tool"):
            self.problems.add("refused")
        content = given.get("content", given.get("value"))
        text = plain(content)
        if content in (None, [], {}) or (text is not None and not seen(text) and role in ("user", "assistant")):
            self.problems.add(EMPTY)
        elif text is None:
            self.problems.add("refused")
        return str(role), text or ""

    def answer(self, template: str) -> tuple[list, str]:
        turns = self.turns(template)
        if turns is None:
            return [], self.text(template)
        if turns[-1][0] != "assistant":
            self.problems.add("refused")
        return turns[:-1], turns[-1][1]

    def prompt(self, before: list) -> list:
        asked = self.task["prompt"]
        own: list | str | None
        if isinstance(asked, list):
            own = [(t["role"], self.text(t["content"])) for t in asked]
        else:
            own = None if asked is None else self.turns(asked) or self.text(asked)
        askers = [text.strip() for role, text in before if role == "user"]
        said = own is None or before[: len(own)] == own or (isinstance(own, str) and own.strip() in askers)
        if before and said:
            own = before
        elif before or own is None:
            self.problems.add("refused")  # another conversation than the prompt, or none
        elif isinstance(own, list) and own[-1][0] == "assistant":
            self.problems.add("refused")
        if isinstance(own, list) and all(role in ("system", "developer") for role, _ in own):
            self.problems.add("refused")  # nobody asks
        return [("user", own)] if isinstance(own, str) else own or []  # fmt: skip

    def render(self, messages: list, prefix: str, said: dict) -> None:
        rest = self.task["continuation"] == "rest"
        self.same = "rejected" in said and said["chosen"] == said["rejected"]
        texts = [text for _, text in messages] + [prefix + (full if rest else step) for step, full in said.values()]
        if not self.task["rendered"] and any(OWN_TOKENS.search(text) for text in texts):
            self.late = True
            return
        if self.task["rendered"]:
            start = messages[-1][1]
            start = start if start.startswith("<|begin|>") else f"<|begin|>{start}"
        else:
            talk = [{"role": role, "content": text} for role, text in messages]
            start = lab().apply_chat_template(talk, tokenize=False, add_generation_prompt=True)
        for name, (step, full) in said.items():
            answer = full if rest else step
            if self.task["rendered"] and answer.rstrip().endswith("<|end|>"):
                answer = answer.rstrip()
            elif answer.strip() == full.strip():
                answer += "<|end|>"
            self.sequences[name] = start + prefix + answer


# --- the project's path ------------------------------------------------------------------------------------------------

NUMBERED = re.compile(r"rows? ((?:\d+, )*\d+)(?: and (\d+) more)? \((\d+) of (\d+)\)")


def rows_named(line: str, total: int) -> tuple[set[int], int]:
    """The rows that a line names, from 0, and how many it counts; both must agree."""
    named, counted = set(), 0
    for found in NUMBERED.finditer(line):
        numbers = [int(n) for n in found[1].split(", ")]
        assert numbers == sorted(set(numbers))
        assert len(numbers) == min(3, int(found[3]))
        assert len(numbers) + int(found[2] or 0) == int(found[3])
        assert int(found[4]) == total
        named |= {n - 1 for n in numbers}
        counted += int(found[3])
    return named, counted


@settings(max_examples=1_000, **MANY)
@given(table=tables(), preference=st.booleans(), amount=st.sampled_from(["all", "all", 1, 2]))
def test_a_table_is_trained_on_as_it_reads_or_refused_with_its_rows_or_counted(
    folder: Path, table: tuple[list[dict], dict], preference: bool, amount: int | str
) -> None:
    rows, given = table
    file = write(folder, rows)
    settings_ = {key: value for key, value in given.items() if key != "empty"}
    task = Task.model_validate({"name": "t", "data": {"path": str(file), "empty": given["empty"]}} | settings_)
    preference = preference and task.rejected is not None
    lacking = [i for i, row in enumerate(rows) if not used(given) <= set(row)]
    if lacking:
        with pytest.raises(UserError, match="missing column") as missing:
            data.check_task(task, amount, 0, preference)
        numbers = ", ".join(str(i + 1) for i in lacking[:3])
        assert len(lacking) == len(rows) or re.search(
            rf"rows? {numbers}(:| and {len(lacking) - 3} more:)", str(missing.value)
        )
        return
    read = [Reading(given, row) for row in rows]
    for reading in read:  # without a sequence for each answer there is nothing to compare
        ids = [ids_of(text) for text in reading.sequences.values()]
        if preference and (reading.same or (len(ids) == 2 and ids[0] == ids[1])):
            reading.problems.add(EQUAL)
    try:
        data.check_task(task, amount, 0, preference)
    except UserError as refused:
        refused_rightly(str(refused), read, given["empty"])
        return
    refused = [r for r in read if r.problems and r.problems <= blamed(given["empty"])]
    assert not refused, refused[0].row
    drawn_rightly(task, read, preference, amount)


def used(task: dict) -> set[str]:
    templates = [task[k] for k in ("prefix", "chosen", "rejected", "full_chosen")] + [task.get("full_rejected")]
    templates += [t["content"] for t in task["prompt"]] if isinstance(task["prompt"], list) else [task["prompt"]]
    return {field[1] for template in templates if template for field in FIELD.finditer(template)}


def blamed(empty: str) -> set[str]:
    """Problems for which rows are refused."""
    return {"refused"} | ({EMPTY} if empty == "refuse" else set())


def refused_rightly(line: str, read: list[Reading], empty: str) -> None:
    assert len(line.splitlines()) == 1, line
    if usable := re.search(
        r"has (\d+) rows(?:, of which (\d+) can be used \(left out: (.*)\))?(?:: choose|: none is left$|$)", line
    ):
        out = dict(part.rsplit(": ", 1) for part in (usable[3] or "").split(", ") if part)
        assert int(usable[2] or usable[1]) + sum(map(int, out.values())) == int(usable[1]) == len(read)
        for reason, count in out.items():
            assert int(count) <= sum(reason in left_out(r, empty) for r in read)
        return
    named, counted = rows_named(line, len(read))
    may = {i for i, r in enumerate(read) if r.problems & blamed(empty)}
    must = {i for i, r in enumerate(read) if r.problems and r.problems <= blamed(empty)}
    assert named
    assert named <= may
    assert len(must) <= counted <= len(may)


def left_out(reading: Reading, empty: str) -> set[str]:
    """The reasons for which a row may be left out."""
    reasons = {PARTED, EQUAL} | ({EMPTY} if empty == "leave_out" else set())
    return reading.problems & reasons


def drawn_rightly(task: Task, read: list[Reading], preference: bool, amount: int | str) -> None:
    """What is drawn as the pipeline draws it: each row that was looked at is trained on, too long, or left out."""
    lengths = [max((len(ids_of(t)) for t in r.sequences.values()), default=0) for r in read]
    make = functools.partial(data.pair_example, lab(), task, preference=preference)
    try:
        drawn = data.subset(data.rows(task.data), make, amount, 64, "task/0")
    except UserError as refused:
        line = str(refused)
        if row := re.match(r"row (\d+): ", line):
            assert read[int(row[1]) - 1].late
            return
        fit = [r for r, length in zip(read, lengths, strict=True) if not r.problems and not r.late and length <= 64]
        assert f"only {len(fit)} of {len(read)} rows fit" in line
        assert len(fit) < (1 if amount == "all" else amount)
        return
    fates = dict.fromkeys(drawn.rows, "used") | dict.fromkeys(drawn.misfits, "long")
    fates |= {index: reason for reason, indices in drawn.left_out.items() for index in indices}
    assert len(fates) == len(drawn.rows) + len(drawn.misfits) + sum(map(len, drawn.left_out.values()))
    assert set(fates) == set(range(len(read))) if amount == "all" else len(drawn.rows) == amount
    for index, fate in fates.items():
        reading = read[index]
        if fate in ("used", "long"):
            assert not reading.problems
            assert not reading.late
            assert (fate == "long") == (lengths[index] > 64)
        else:
            assert fate in left_out(reading, task.data.empty)
    for index, trained in zip(drawn.rows, drawn.examples, strict=True):
        for name, text in read[index].sequences.items():
            ids = trained["prompt_ids"] + trained[f"{name}_ids"]
            assert trained[f"{name}_ids"]
            assert lab().decode(ids) == text
            assert ids == ids_of(text)


def ids_of(text: str) -> list[int]:
    return lab()(text, add_special_tokens=False)["input_ids"]


# --- conversations of the warm-up --------------------------------------------------------------------------------------

CALLING = (
    "{{ bos_token }}{% for m in messages %}<|{{ m.role }}|>{{ m.content or '' }}{% for c in m.tool_calls or [] %}"
    "<call>{{ c.function.name }} {{ c.function.arguments | tojson }}{% endfor %}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@functools.cache
def calling():
    """The lab's tokenizer with a template that knows tool calls."""
    own = copy.deepcopy(lab())
    own.chat_template = CALLING
    return own


ARGUMENTS = st.dictionaries(
    st.sampled_from(["what", "n"]), TEXTS.filter(lambda t: "<" not in t) | st.integers(), max_size=2
)
CALLS = st.lists(st.tuples(st.sampled_from(["pick", "look_up"]), ARGUMENTS, st.booleans()), min_size=1, max_size=2)
WEIGHTS = st.sampled_from([None, None, None, 0, 1, 1.0, True, 0.5, "1", math.nan])
CONTENTS = st.one_of(TEXTS, TEXTS, TEXTS, PARTS, NUMBERS)


@st.composite
def talks(draw) -> list[dict]:
    """A conversation in one of the known layouts, mostly in order, with an oddity or two."""
    names = draw(st.sampled_from([("role", "content"), ("role", "content"), ("from", "value")]))
    roles = draw(st.sampled_from([[], [], [], ["system"], ["system"], ["developer"], ["assistant"]]))
    roles = (
        roles
        + ["user", "assistant"] * draw(st.integers(1, 3))
        + draw(st.sampled_from([[], [], ["user"], ["assistant"], ["tool"]]))
    )
    talk = [turn(role, draw(CONTENTS), names) for role in roles]
    for said in talk:
        role = said[names[0]]
        if role in ("assistant", "gpt") and draw(st.integers(0, 9)) == 0:
            said["tool_calls"] = [called(*call) for call in draw(CALLS)]
            said[names[1]] = draw(st.sampled_from([None, "", "Let me see.", said[names[1]]]))
        if draw(st.integers(0, 5)) == 0:
            said["weight"] = draw(WEIGHTS if role in ("assistant", "gpt") else st.sampled_from([None, 0, 0, 1]))
        if draw(st.booleans()):  # as tables fill them up
            said |= {"name": None, "reasoning_content": draw(st.sampled_from([None, ""]))} | {
                k: said.get(k) for k in ("tool_calls", "weight")
            }
    if draw(st.integers(0, 2)) == 0:
        odd, key = (
            draw(st.sampled_from(talk)),
            draw(st.sampled_from([*names, names[1], "name", "thinking", "function_call", "loss", "value"])),
        )
        speakers = st.just(NAME) | CARRIED  # a dropped name that stands elsewhere, too, is not noticed
        odd[key] = draw(
            speakers
            if key == "name"
            else NOTHING | NO_TEXT | CARRIED | TEXTS | st.sampled_from(["user", "assistant", "narrator"])
        )
    return talk


def called(name: str, arguments: dict, as_json: bool) -> dict:
    return {
        "id": "c1",
        "type": "function",
        "function": {"name": name, "arguments": json.dumps(arguments) if as_json else arguments},
    }


KNOWN = {"human": "user", "gpt": "assistant", "chatgpt": "assistant"} | {r: r for r in ("system", "developer", "user", "assistant", "tool")}  # fmt: skip
NAME = "Ann-2718"
UNREAD = ("function_call", "loss", "name", "thinking")


class Talk:
    """What a conversation says: its whole `text`, the `learned` turns; or that it is `refused`, or left out as `nothing`."""

    def __init__(self, given: list[dict], knows_calls: bool) -> None:
        self.refused, self.nothing = False, False
        turns = [self.turn(t, knows_calls) for t in given]
        asked = [role for role, *_ in turns]
        self.learned = [f"{said}<|end|>" for role, said, learned in turns if role == "assistant" and learned]
        first = next((i for i, (role, _, learned) in enumerate(turns) if role == "assistant" and learned), 0)
        self.refused |= "assistant" not in asked
        self.nothing |= not self.learned
        self.refused |= bool(self.learned) and all(role in ("system", "developer") for role in asked[:first])
        last = max((i for i, (role, _, learned) in enumerate(turns) if role == "assistant" and learned), default=-1)
        self.refused |= any(t.get("name") == NAME for t in given[: last + 1])  # behind it nothing is learned
        self.text = "<|begin|>" + "".join(f"<|{role}|>{said}<|end|>" for role, said, _ in turns)

    def turn(self, given: dict, knows_calls: bool) -> tuple[str, str, bool]:
        given = {k: v for k, v in given.items() if v not in (None, [], {})}
        role = given.get("role", given.get("from"))
        role = KNOWN.get(role) if isinstance(role, str) else None
        contents = [given[k] for k in ("content", "value") if k in given]
        content = contents[0] if contents else None
        calls, weight = given.get("tool_calls", []), given.get("weight", 1)
        text = plain(content) or ""
        self.refused |= role is None or len({repr(c) for c in contents}) > 1
        self.refused |= (content is None and not calls) or (content is not None and plain(content) is None)
        self.refused |= any(
            given.get(k, "") not in ("", NAME) for k in UNREAD if k != "thinking" or str(given.get(k)).strip()
        )  # which neither template writes
        self.refused |= (
            weight not in (0, 1) or isinstance(weight, str) or (role != "assistant" and given.get("weight", 0) == 1)
        )
        self.refused |= bool(OWN_TOKENS.search(text)) or (bool(calls) and not knows_calls)
        self.nothing |= role in ("user", "assistant") and not seen(text) and not calls
        for call in calls:
            arguments = call["function"]["arguments"]
            arguments = json.loads(arguments) if isinstance(arguments, str) else arguments
            text += f"<call>{call['function']['name']} {json.dumps(arguments, ensure_ascii=False)}"
        return str(role), text, weight != 0


@settings(max_examples=600, **MANY)
@given(talk=talks(), as_json=st.booleans(), knows_calls=st.booleans())
def test_a_conversation_is_learned_as_it_reads_or_refused_or_left_out(
    talk: list, as_json: bool, knows_calls: bool
) -> None:
    tokenizer = calling() if knows_calls else lab()
    warmup = Warmup(name="w", data=Data(path="x"))
    make = functools.partial(data.general_example, tokenizer, warmup)
    trained, fate = data.example_and_fate(make, {"chosen": json.dumps(talk) if as_json else talk}, 10**6)
    assert len(fate.splitlines()) == 1, fate
    says = Talk(talk, knows_calls)
    if trained is None:
        assert says.refused if fate.startswith(BAD) else says.nothing, fate
        return
    assert not says.refused
    assert not says.nothing
    assert tokenizer.decode(trained["input_ids"]) == says.text
    assert trained["input_ids"] == ids_of(says.text)
    assert [i for i in trained["labels"] if i != -100] == [i for turn in says.learned for i in ids_of(turn)]
    assert all(label in (-100, i) for i, label in zip(trained["input_ids"], trained["labels"], strict=True))


# --- golds and answers -------------------------------------------------------------------------------------------------

WRITTEN = st.sampled_from(["18", "1,234", "2.50", "-7", "3/4", r"\frac{3}{4}", r"\boxed{18}", "#### 18", "$18", "18 eggs", "1e400", "0,25", "(2, 8)", r"3\sqrt{13}",
    "Gains from Trade", "apples", "漢字", "!!!", "...", "B", "x^2", "3:30", "five", "half", "12 or 13", "yes.", "naïve Bayes"])  # fmt: skip
GOLDS = WRITTEN | TEXTS | NUMBERS | PARTS
NO_NUMBER = st.text("bcdfgjkpqrsvzBCDFGJKPQRSVZ ?!;\n", max_size=20)
ODD_GOLDS = NOTHING | NO_TEXT


@st.composite
def items(draw) -> tuple[dict, dict]:
    """A row of a test, and a benchmark over it."""
    kind = draw(st.sampled_from(["number", "exact", "rouge", "choice"]))
    row = {"q": draw(st.one_of(GOOD, GOOD, GOOD, NOTHING | NO_TEXT))}
    told = {"kind": kind, "prompt": draw(st.sampled_from(["{q}", "Q: {q}\nA:", "{q} \\boxed{{}}"])), "gold": "{a}"}
    if kind == "choice":
        size = draw(st.integers(1, 4))
        texts = st.one_of(GOOD, GOOD, GOOD, ODD_GOLDS, CARRIED)
        row["offered"] = draw(st.lists(texts, min_size=size, max_size=size) | st.lists(GOOD, max_size=3))
        row["labels"] = draw(st.sampled_from([["A", "B", "C", "D"][:size], [1, 2, 3, 4][:size], ["1", 1, 2, 3][:size]]))
        row["a"] = draw(st.sampled_from([*row["labels"], "A", "E", 1, 2.0, None, True]))
        return row, told | {"choices": "offered", "labels": "labels"}
    one = st.one_of(GOLDS, GOLDS, GOLDS, GOLDS, ODD_GOLDS)
    row["a"] = draw(st.lists(one, max_size=3) if draw(st.booleans()) else one)
    told["gold"] = draw(st.sampled_from(["{a}", "{a}", "{a}", "#### {a}", "{a:>4}", "{a[text]}", "{a[0]}"]))
    if told["gold"] == "{a[text]}" and draw(st.booleans()):
        row["a"] = {"text": row["a"]}
    return row, told


def golds_of(template: str, value: object) -> list[str] | None:
    """The golds that a value gives in a template; None where one is no text."""
    start, key, width = re.fullmatch(r"(.*)\{a(?:\[(\w+)\])?(?::>(\d))?\}", template).groups()
    if key == "text":
        value = value.get("text") if isinstance(value, dict) else None
    elif key:
        value = value[0] if isinstance(value, list) and value else None
    values = value if isinstance(value, list) and plain(value) is None else [value]
    texts = [plain(v) for v in values]
    if not texts or None in texts:
        return None
    return [start + text.rjust(int(width or 0)) for text in texts]


@settings(max_examples=400, **MANY)
@given(item=items(), other=GOLDS.map(plain), silent=NO_NUMBER)
def test_an_accepted_gold_equals_itself_and_nothing_else_is_asked(
    item: tuple[dict, dict], other: str, silent: str
) -> None:
    row, told = item
    benchmark = Benchmark.model_validate({"data": {"path": "x"}} | told)
    question = plain(row["q"])
    asked = told["prompt"].replace("{q}", question or "").replace("{{}}", "{}") if question is not None else None
    rows = [
        {"q": "a", "a": "18"} | ({"offered": ["a", "b"], "labels": ["18", "2"]} if told["kind"] == "choice" else {})
    ] * 2
    rows = [*rows, row] if told["gold"] in ("{a}", "#### {a}", "{a:>4}") else [row]
    try:
        data.check_items(benchmark, rows)
    except UserError as refused:
        line = str(refused)
        assert len(line.splitlines()) == 1, line
        assert f": row {len(rows)}: " in line
        assert refused_item(told, row, asked), line
        return
    assert asked is not None
    assert seen(asked)
    harness = task_of("t", benchmark, rows, template=True)
    doc = {"row": len(rows) - 1}
    assert harness.doc_to_text(doc) == asked
    if told["kind"] == "choice":
        place = harness.doc_to_target(doc)
        assert [plain(label) for label in row["labels"]].index(plain(row["a"])) == place
        assert harness.doc_to_choice(doc) == [plain(text) for text in row["offered"]]
        assert harness.doc_to_choice(doc).count(harness.doc_to_choice(doc)[place]) == 1
        return
    golds = golds_of(told["gold"], row["a"])
    assert golds
    assert data.golds(benchmark, row) == golds
    score = lambda answer: harness.process_results(doc, [answer])  # noqa: E731
    alone = {"number": answers.same_number, "exact": answers.same_text, "rouge": rouge}[told["kind"]]
    for gold in golds:
        assert (
            (score(gold)["rouge1"], score(gold)["rougeL"]) == (1, 1)
            if told["kind"] == "rouge"
            else score(gold) == {"accuracy": 1}
        )
    for answer in (other, silent, "", *golds):
        each = [alone(answer, gold) for gold in golds]
        best = {m: max(one[m] for one in each) for m in each[0]} if told["kind"] == "rouge" else {"accuracy": any(each)}
        assert score(answer) == best
    if told["kind"] != "rouge":
        assert score("")["accuracy"] == 0
    if told["kind"] == "number":
        assert answers.final_number(silent) is None
        assert score(silent)["accuracy"] == 0


def refused_item(told: dict, row: dict, asked: str | None) -> bool:
    """Whether a row may be refused: it asks nothing, or has no gold that can be compared."""
    if asked is None or not seen(asked):
        return True
    if told["kind"] == "choice":
        offered, labels, gold = [plain(t) for t in row["offered"]], [plain(t) for t in row["labels"]], plain(row["a"])
        whole = all(t and seen(t) for t in offered) and len({t.strip() for t in offered}) == len(offered)
        return not (whole and len(offered) > 1 and len(offered) == len(labels) == len(set(labels)) and gold in labels)
    golds = golds_of(told["gold"], row["a"])
    if not golds or not all(seen(gold) for gold in golds):
        return True
    readable = {"number": answers.gold_number, "exact": lambda g: answers.exact_text(g) or None, "rouge": latin}
    return any(readable[told["kind"]](gold) is None for gold in golds)


def latin(text: str) -> str | None:
    """What ROUGE sees of a text; None for one that is mostly in another script."""
    read = re.sub(r"[^a-z0-9]+", "", text.lower())
    other = [letter for letter in text.lower() if letter.isalpha() and not letter.isascii()]
    return None if other else read or None


# --- what the fuzz found -------------------------------------------------------------------------------------------------

ROW = {"q": "Name a fruit.", "good": "An apple.", "bad": "A stone."}
ASKS, TELLS, BLANK = (
    {"role": role, "content": text} for role, text in (("user", "Hi."), ("assistant", "Ho."), ("user", " "))
)


def line_of(folder: Path, row: dict, empty: str = "refuse", beside: dict | None = None, **more) -> str | None:
    """What is said against a table with one such row behind a good one; None where it is taken."""
    file = write(folder, [ROW | (beside or {}), ROW | row])
    given = {"name": "t", "prompt": "{q}", "chosen": "{good}", "rejected": "{bad}"} | more
    task = Task.model_validate({"data": {"path": str(file), "empty": empty}} | given)
    try:
        data.check_task(task, 1, 0)
    except UserError as error:
        return str(error)
    return None


@pytest.mark.parametrize("column", list(ROW))
def test_a_part_of_a_text_is_no_character(folder: Path, column: str) -> None:
    """Where some rows hold lists and others a text, "{answers[0]}" took the text's first letter."""
    templates = {"q": "prompt", "good": "chosen", "bad": "rejected"}
    more = {templates[column]: f"{{{column}[0]}}", "beside": {column: ["A list's first."]}}
    assert f"row 2 (1 of 2): there is no text {{{column}[0]}}" in str(line_of(folder, {}, **more))
    benchmark = Benchmark.model_validate({"data": {"path": "x"}, "kind": "exact", "prompt": "{q[0]}", "gold": "{a[0]}"})
    with pytest.raises(UserError, match=r"row 2: gold=\{a\[0\]\}: 'Paris' is a text"):
        data.check_items(benchmark, [{"q": ["?"], "a": ["Paris"]}, {"q": ["?"], "a": "Paris"}])


@pytest.mark.parametrize("column", list(ROW))
def test_half_a_character_is_no_text(folder: Path, column: str) -> None:
    """JSON can write it, no tokenizer and no file takes it."""
    assert f"row 2 (1 of 2): column {column} holds no text" in str(line_of(folder, {column: "a \ud83d"}))
    benchmark = Benchmark.model_validate({"data": {"path": "x"}, "kind": "exact", "prompt": "{q}", "gold": "{good}"})
    if column != "bad":
        with pytest.raises(UserError, match="row 1: "):
            data.check_items(benchmark, [ROW | {column: "a \ud83d"}])


@pytest.mark.parametrize(
    "silent",
    [BLANK, BLANK | {"content": None}, BLANK | {"role": "assistant", "content": ""}, {"from": "human", "value": []}],
)
def test_a_pair_s_blank_turn_is_nothing(folder: Path, silent: dict) -> None:
    before = [ASKS, TELLS, silent, ASKS]
    tell = lambda turns: {n: [*turns, {"role": "assistant", "content": ROW[n]}] for n in ("good", "bad")}  # noqa: E731
    for row, beside, prompt, column in ((tell(before), tell([ASKS]), None, "good"), ({"q": before}, None, "{q}", "q")):
        line = str(line_of(folder, row, prompt=prompt, beside=beside))
        assert f"row 2 (1 of 2): nothing in turn 3 in {{{column}}}; +task.data.empty=leave_out" in line
        assert line_of(folder, row, "leave_out", beside, prompt=prompt) is None  # the other row is trained on


def test_a_system_turn_alone_asks_for_nothing(folder: Path) -> None:
    system = {"role": "system", "content": "Be brief."}
    pair = {name: [system, {"role": "assistant", "content": ROW[name]}] for name in ("good", "bad")}
    beside = {name: [system, ASKS, turns[-1]] for name, turns in pair.items()}
    assert "row 2 (1 of 2): nothing to answer" in str(line_of(folder, pair, prompt=None, beside=beside))
    with pytest.raises(ValueError, match="'system', 'developer', 'user', 'assistant' or 'tool'"):
        line_of(folder, {}, prompt=[{"role": "usr", "content": "{q}"}])


def test_a_table_of_which_nothing_is_left_is_not_told_to_take_all_of_it(folder: Path) -> None:
    line = str(line_of(folder, ROW | {"q": None}, "leave_out", beside={"q": " "}))
    assert line.endswith("has 2 rows, of which 0 can be used (left out: empty: 2): none is left")


@pytest.mark.parametrize("role", ["user", "assistant"])
def test_a_name_carries_no_token_and_is_not_dropped(role: str) -> None:
    for name, told in (("<|end|>", "carries the model's own token <|end|>"), ("Ann", "says: Ann")):
        talk = [turn | ({"name": name} if turn["role"] == role else {}) for turn in (ASKS, TELLS)]
        with pytest.raises(UserError) as refused:
            data.conversation_example(lab(), talk)
        assert told in str(refused.value)


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking"])
def test_thoughts_of_a_user_are_refused(key: str) -> None:
    with pytest.raises(UserError, match=f"turn 1: {key} of a user turn"):
        data.conversation_example(lab(), [ASKS | {key: "Hm."}, TELLS])
    assert data.conversation_example(lab(), [ASKS | {key: " "}, TELLS]) == data.conversation_example(
        lab(), [ASKS, TELLS]
    )


@pytest.mark.parametrize("gold", ["漢字", "!!!", ["apples", "яблоки"]])
def test_a_gold_that_rouge_can_not_read_is_refused(gold: object) -> None:
    """The identical answer would get 0."""
    rows = [{"q": "?", "a": "apples"}, {"q": "?", "a": gold}]
    benchmark = Benchmark.model_validate({"data": {"path": "x"}, "kind": "rouge", "prompt": "{q}", "gold": "{a}"})
    with pytest.raises(UserError, match=r"row 2: the gold answer .* (is in another script than Latin|has no word)"):
        data.check_items(benchmark, rows)
    data.check_items(benchmark.model_copy(update={"kind": "exact"}), rows[:1] if gold == "!!!" else rows)


@pytest.mark.parametrize(
    ("row", "more", "told"),
    [
        ({"q": None}, {"prompt": "Q: {q}\nA:"}, r"row 1: prompt='Q: {q}\nA:': None is no text"),
        ({"q": True}, {"prompt": "{q} \\boxed{{}}"}, r"row 1: prompt={q} \boxed{{}}: True is no text"),
        ({"a": ["18", "20"]}, {"gold": "{a:d}"}, "row 1: gold={a:d} can't be filled in (ValueError: "),
        ({"a": "C", "offered": ["x", "y"], "labels": ["A\nB", "D"]}, {"kind": "choice", "gold": "{a}", "choices": "offered", "labels": "labels"}, r"row 1: the gold label 'C' is none of 'A\nB', D"),
    ],
)  # fmt: skip
def test_a_problem_of_a_test_item_is_one_line_that_says_it(row: dict, more: dict, told: str) -> None:
    given = {"data": {"path": "x"}, "kind": "exact", "prompt": "{q}", "gold": "{a}"} | more
    with pytest.raises(UserError) as refused:
        data.check_items(Benchmark.model_validate(given), [{"q": "?", "a": "18"} | row])
    assert told in str(refused.value)
    assert "\n" not in str(refused.value)
