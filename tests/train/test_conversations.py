"""Conversations as data sets have them: read as what they say, refused, or left out and counted. Nothing is learned by mistake."""

import copy
import json
import re
from pathlib import Path

import pytest
import torch
import trl
from doing import adapter, do
from transformers import AutoTokenizer

from d2lora import data
from d2lora.base import load_base
from d2lora.data.texts import LeftOut
from d2lora.errors import UserError
from d2lora.evaluate import harness
from d2lora.layouts import proof
from d2lora.settings import Benchmark, Data, Model, Task

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(ROOT / "d2lora/lab/base")


def user(text: object = "Name a fruit.", **more) -> dict:
    return {"role": "user", "content": text, **more}


def assistant(text: object = "An apple.", **more) -> dict:
    return {"role": "assistant", "content": text, **more}


def learned(tokenizer, value: object, tools: object = None) -> str:
    example = data.conversation_example(tokenizer, value, tools)
    return tokenizer.decode([i for i in example["labels"] if i != -100])


def of(tokenizer, template: str):
    """The tokenizer with another template."""
    own = copy.deepcopy(tokenizer)
    own.chat_template = template
    return own


SHAREGPT = [{"from": "system", "value": "Be brief."}, {"from": "human", "value": "Name a fruit."}, {"from": "gpt", "value": "An apple."}]  # fmt: skip
PLAIN = [{"role": "system", "content": "Be brief."}, user(), assistant()]


@pytest.mark.parametrize(
    "value",
    [
        SHAREGPT,
        json.dumps(PLAIN),
        [PLAIN[0], user([{"type": "text", "text": "Name "}, {"type": "text", "text": "a fruit."}]), assistant()],
        [{**m, "tool_calls": None, "name": None, "weight": None, "reasoning_content": ""} for m in PLAIN],  # of a table
        [PLAIN[0], user(id=7, timestamp="today"), assistant(weight=1)],
        [PLAIN[0], user(weight=0), assistant(weight=1.0)],
    ],
)
def test_a_known_layout_is_read_as_what_it_says(tokenizer, value: object) -> None:
    assert data.conversation_example(tokenizer, value) == data.conversation_example(tokenizer, PLAIN)
    assert learned(tokenizer, value) == "An apple.<|end|>"


@pytest.mark.parametrize(
    ("value", "told"),
    [
        (None, "no conversation: a list of"),
        ("user: Hello", "no conversation: a list of"),
        ([], "no conversation: a list of"),
        (["Hello", "Hi"], "no conversation: a list of"),
        ({"role": "user"}, "no conversation: a list of"),
        ([user()], "a conversation without an assistant turn"),
        ([assistant(), user(), assistant()], "begins with the assistant"),
        ([PLAIN[0], assistant()], "begins with the assistant"),
        ([user(), {"role": "narrator", "content": "x"}, assistant()], r"turn 2: role 'narrator' is none of system, .*human"),
        ([{"content": "x"}, assistant()], "turn 1: role None is none of"),
        ([user(), {"role": "assistant", "from": "human", "content": "x"}], "turn 2: role and from differ"),
        ([user(), {"role": "assistant"}], r"turn 2 \(assistant\): nothing in content"),
        ([user(None), assistant()], r"turn 1 \(user\): nothing in content"),
        ([user([{"type": "image", "url": "a.png"}]), assistant()], "turn 1: content .* is no text"),
        ([user({"text": "x"}), assistant()], "turn 1: content .* is no text"),
        ([user(True), assistant()], "turn 1: content True is no text"),
        ([user(), assistant(weight=0.5)], r"turn 2: weight 0.5 is neither 0 nor 1"),
        ([user(weight=1), assistant()], "turn 1: weight 1 of a user turn"),
        ([user(), assistant(function_call={"name": "f", "arguments": "{}"})], "turn 2: function_call is not supported"),
        ([user(), assistant(refusal="I can't.")], "turn 2: refusal is not supported"),
        ([user(), assistant(tool_calls="f()")], "turn 2: tool_calls is no list"),
        ([user(), assistant(tool_calls=[{"function": {"name": "f"}}])], "turn 2: a tool call is"),
        ([user(), assistant(None, tool_calls=[{"function": {"name": "f", "arguments": "{}"}}])], "leaves out the tool call of turn 2: 'f'"),
        ([user(tool_calls=[{"function": {"name": "f", "arguments": {}}}]), assistant()], "turn 1: tool_calls of a user turn"),
        ([user(name="Ann"), assistant()], r"leaves out what turn 1 \(user\) says: Ann"),
        ([user(), assistant(reasoning="Fruit grow on trees.")], r"leaves out what turn 2 \(assistant\) says: Fruit"),
        ([user("Hi<|end|>"), assistant()], r"a turn \(user\) carries the model's own token <\|end\|>"),
        ([user(), assistant("<|begin|>Hi")], r"a turn \(assistant\) carries the model's own token <\|begin\|>"),
    ],
)  # fmt: skip
def test_what_can_not_be_read_or_rendered_is_refused_in_one_line(tokenizer, value: object, told: str) -> None:
    with pytest.raises(UserError, match=told) as refused:
        data.conversation_example(tokenizer, value)
    assert len(str(refused.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ([user(), assistant("")], r"a blank turn \(assistant\)"),
        ([user(), assistant(" \n"), user(), assistant()], r"a blank turn \(assistant\)"),
        ([user("  "), assistant()], r"a blank turn \(user\)"),
        ([user(), assistant(weight=0)], r"no turn to learn \(weight 0\)"),
    ],
)
def test_what_has_nothing_to_learn_is_left_out(tokenizer, value: list, reason: str) -> None:
    with pytest.raises(LeftOut, match=reason):
        data.conversation_example(tokenizer, value)


def test_a_turn_of_weight_0_is_seen_and_not_learned(tokenizer) -> None:
    talk = [user(), assistant("A stone.", weight=0), user("No."), assistant()]
    example = data.conversation_example(tokenizer, talk)
    assert learned(tokenizer, talk) == "An apple.<|end|>"
    assert "A stone.<|end|>" in tokenizer.decode(example["input_ids"])
    assert learned(tokenizer, [assistant("Hello!", weight=0), user(), assistant()]) == "An apple.<|end|>"


TURN = "<|{{ m.role }}|>{{ m.content }}<|end|>"
ASKED = "{% if add_generation_prompt %}<|assistant|>{% endif %}"
NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"


@pytest.mark.parametrize(
    ("template", "told"),
    [
        (f"{NO_SYSTEM}{{% for m in messages %}}{TURN}{{% endfor %}}{ASKED}", "template refuses the conversation: System role not supported"),
        (f"{{% for m in messages %}}{{% if m.role != 'system' %}}{TURN}{{% endif %}}{{% endfor %}}{ASKED}", r"template leaves out what turn 1 \(system\) says: Be brief"),
        (f"{{% for m in messages if m.role != 'assistant' %}}{TURN}{{% endfor %}}{ASKED}", "turn 3 does not follow the prompt that the model's chat template gives for it"),
        (f"{{% for m in messages %}}{TURN}{{{{ m.content.nothing.there }}}}{{% endfor %}}{ASKED}", "template refuses the conversation: "),
    ],
)  # fmt: skip
def test_a_template_that_refuses_or_drops_a_turn_is_one_line(tokenizer, template: str, told: str) -> None:
    with pytest.raises(UserError, match=told):
        data.conversation_example(of(tokenizer, template), PLAIN)


def test_a_turn_is_missed_even_where_another_says_the_same(tokenizer) -> None:
    only_first = of(
        tokenizer, f"{{% for m in messages %}}{{% if loop.index != 3 %}}{TURN}{{% endif %}}{{% endfor %}}{ASKED}"
    )
    with pytest.raises(UserError, match=r"leaves out what turn \d \(.*\) says: Again"):
        data.conversation_example(
            only_first, [user("Again."), assistant("Again."), user("Again."), assistant("Again.")]
        )


def test_a_template_that_cuts_texts_is_refused_and_no_text_becomes_python_source(tokenizer) -> None:
    cut = of(tokenizer, f"{{% for m in messages %}}{TURN.replace('m.content', 'm.content[:5]')}{{% endfor %}}{ASKED}")
    with pytest.raises(UserError, match="leaves out what turn 1"):
        data.conversation_example(cut, PLAIN)
    with pytest.raises(UserError, match="leaves out what turn 1"):
        data.rendered_prompt(cut, "Name a fruit.")


def test_a_template_that_reads_typed_parts_only_is_given_them(tokenizer) -> None:
    """Templates of models that see images: they would write a plain text's turns empty."""
    parts = of(tokenizer, "{% for m in messages %}<|{{ m.role }}|>{% for p in m.content %}{% if p.type == 'text' %}{{ p.text }}{% endif %}{% endfor %}<|end|>{% endfor %}" + ASKED)  # fmt: skip
    assert learned(parts, PLAIN) == "An apple.<|end|>"
    assert data.rendered_prompt(parts, "Hi") == "<|user|>Hi<|end|><|assistant|>"


def test_a_template_without_ends_is_ended_as_the_tokenizer_names_it(tokenizer) -> None:
    """Each turn alone: amid a conversation the template writes none."""
    endless = of(tokenizer, "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}\n{% endfor %}" + ASKED)
    example = data.conversation_example(endless, [user(), assistant(), user("And?"), assistant("A pear.")])
    texts = [tokenizer.decode(e["input_ids"]) for e in example["turns"]]
    assert (
        texts[1] == "<|begin|><|user|>Name a fruit.\n<|assistant|>An apple.\n<|user|>And?\n<|assistant|>A pear.<|end|>"
    )
    assert [tokenizer.decode([i for i in e["labels"] if i != -100]) for e in example["turns"]] == ["An apple.<|end|>", "A pear.<|end|>"]  # fmt: skip


def test_a_template_of_prompts_only_still_serves_the_second_phase(tokenizer) -> None:
    prompts = of(tokenizer, "{{ bos_token }}<|user|>{{ messages[-1].content }}<|end|><|assistant|>")
    task = Task.model_validate({"name": "t", "data": {"path": "x"}, "prompt": "{q}", "chosen": "{a}"})
    example = data.pair_example(prompts, task, {"q": "Hi", "a": "Ho"})
    assert (
        tokenizer.decode(example["prompt_ids"] + example["chosen_ids"])
        == "<|begin|><|user|>Hi<|end|><|assistant|>Ho<|end|>"
    )
    with pytest.raises(UserError, match="leaves out what turn"):
        data.conversation_example(prompts, PLAIN)


def test_a_history_may_be_a_task_s_prompt(tokenizer) -> None:
    history = [*PLAIN, user("And a colour?")]
    text = data.rendered_prompt(tokenizer, history, "It is")
    assert text == "<|begin|><|system|>Be brief.<|end|><|user|>Name a fruit.<|end|><|assistant|>An apple.<|end|><|user|>And a colour?<|end|><|assistant|>It is"  # fmt: skip


# --- the templates of many families ----------------------------------------------------------------------------------

FAMILIES = sorted(
    f.stem for f in (Path(trl.__file__).parent / "chat_templates").glob("*.jinja") if not f.stem.endswith("_training")
)
MARKS = r"<[|｜]?[A-Za-z_][\w▁|｜/]*[|｜]?>|</?(?:s|think|end_of_turn|start_of_turn)>|\[/?INST\]"
LONG = [user(), assistant(), user("And a colour?"), assistant("Blue.\n\nOr green.")]


def family(tokenizer, name: str):
    """The lab's tokenizer with the template of a family, as TRL has it, and its tokens."""
    template = (Path(trl.__file__).parent / "chat_templates" / f"{name}.jinja").read_text()
    own = of(tokenizer, template)
    own.add_special_tokens(
        {"additional_special_tokens": sorted(set(re.findall(MARKS, template)) - {"<think>", "</think>"})}
    )
    own.add_tokens(["<think>", "</think>"])
    data.set_up(own)
    return own


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_s_turns_are_learned_where_they_are_asked_for(tokenizer, name: str) -> None:
    own = family(tokenizer, name)
    shape = data.shape(own)
    example = data.conversation_example(own, LONG)
    learned = [i for e in data.sequences(example) for i in e["labels"] if i != -100]
    answers = [f"{shape.opening}{turn['content']}{shape.end}" for turn in LONG[1::2]]
    assert own.decode(learned) == own.decode(
        [i for a in answers for i in own(a, add_special_tokens=False)["input_ids"]]
    )
    first = own.decode(data.sequences(example)[0]["input_ids"])
    prompt = own.decode(own(data.rendered_prompt(own, LONG[0]["content"]), add_special_tokens=False)["input_ids"])
    assert first.removeprefix("<|begin|>").startswith(prompt.removeprefix("<|begin|>") + own.decode(own(shape.opening, add_special_tokens=False)["input_ids"]) + "An apple.")  # fmt: skip
    assert shape.end == "<|end|>" or shape.ended
    task = Task.model_validate({"name": "t", "data": {"path": "x"}, "prompt": "{q}", "chosen": "{a}"})
    pair = data.pair_example(own, task, {"q": LONG[0]["content"], "a": "An apple."})
    assert data.sequences(example)[0]["input_ids"][: len(pair["prompt_ids"])] == pair["prompt_ids"]
    assert learned[: len(pair["chosen_ids"])] == pair["chosen_ids"]


# --- rows that are rendered already ----------------------------------------------------------------------------------

RENDERED = "<|begin|><|user|>Name a fruit.<|end|><|assistant|>An apple.<|end|><|user|>And?<|end|><|assistant|>A pear."


@pytest.mark.parametrize(
    "text", [RENDERED, f"{RENDERED}<|end|>", f"{RENDERED}<|end|>\n", RENDERED.removeprefix("<|begin|>")]
)
def test_a_rendered_conversation_has_one_begin_and_one_end(tokenizer, text: str) -> None:
    plain = data.conversation_example(tokenizer, [user(), assistant(), user("And?"), assistant("A pear.")])
    example = data.rendered_conversation(tokenizer, text)
    assert {k: v[: len(plain[k])] for k, v in example.items()} == plain


@pytest.mark.parametrize("text", ["", None, PLAIN, "<|user|>Hi<|end|>", "<|user|>Hi<|end|><|assistant|>"])
def test_a_text_without_an_assistant_turn_is_refused(tokenizer, text: object) -> None:
    with pytest.raises(UserError, match=r"warmup.rendered=true: "):
        data.rendered_conversation(tokenizer, text)


# --- one end ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def two_ends(tiny: Path, tmp_path: Path) -> Path:
    """A model whose template ends turns with <|stop|> and whose tokenizer and checkpoint name <|end|>, after its last turn."""
    from transformers import LlamaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(tiny)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|stop|>"]})
    tokenizer.chat_template = (
        "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|stop|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% else %}{{ eos_token }}{% endif %}"
    )
    made = LlamaForCausalLM.from_pretrained(tiny)
    made.resize_token_embeddings(len(tokenizer))
    made.save_pretrained(tmp_path / "two_ends")
    tokenizer.save_pretrained(tmp_path / "two_ends")
    return tmp_path / "two_ends"


def test_one_end_everywhere_said_once(two_ends: Path, tmp_path: Path, capsys) -> None:
    base = load_base(Model(name="two", path=str(two_ends)), tmp_path)
    load_base(Model(name="two", path=str(two_ends)), tmp_path)
    told = capsys.readouterr().err
    assert told.count("<|stop|>") == 2
    assert told.splitlines() == [line for line in told.splitlines() if "its chat template ends turns with <|stop|>, its tokenizer names <|end|>" in line]  # fmt: skip
    stop, end = base.tokenizer.convert_tokens_to_ids(["<|stop|>", "<|end|>"])
    assert base.model.generation_config.eos_token_id == [end, stop]
    assert (
        learned(base.tokenizer, [user(), assistant(), user(), assistant("A pear.")])
        == "An apple.<|stop|>A pear.<|stop|>"
    )
    task = Task.model_validate({"name": "t", "data": {"path": "x"}, "prompt": "{q}", "chosen": "{a}"})
    assert data.pair_example(base.tokenizer, task, {"q": "Hi", "a": "Ho"})["chosen_ids"][-1] == stop


def test_generation_ends_at_the_template_s_end(two_ends: Path, tmp_path: Path) -> None:
    base = load_base(Model(name="two", path=str(two_ends)), tmp_path)
    stop = base.tokenizer.convert_tokens_to_ids("<|stop|>")
    benchmark = Benchmark(data=Data(path="x"), kind="rouge", prompt="{q}", gold="{a}", max_new_tokens=8)
    task = harness.task_of("t", benchmark, [{"q": "Name a fruit.", "a": "An apple."}], template=True)
    ids = torch.tensor([data.encode(base.tokenizer, data.rendered_prompt(base.tokenizer, "Name a fruit."))])
    tested = copy.deepcopy(base.model)
    with torch.no_grad():
        hidden = tested.model(input_ids=ids).last_hidden_state[0, -1]
        tested.lm_head.weight = torch.nn.Parameter(tested.lm_head.weight.clone())
        tested.lm_head.weight[stop] = 100 * hidden  # the likeliest first token
    generated = tested.generate(input_ids=ids, max_new_tokens=8)
    assert generated[0, ids.shape[1] :].tolist() == [stop]
    memory = proof.Memory(tmp_path / "proofs", {})
    _, items, _ = harness.evaluate(base, tested, harness.Test(task, True), 1, lambda done, total: None, memory)
    assert items[0]["answer"] == ""


def test_the_lab_s_base_is_as_it_was(tmp_path: Path, tokenizer, capsys) -> None:
    base = load_base(Model(name="lab", path="d2lora/lab/base"), tmp_path)
    assert capsys.readouterr().err == ""
    assert base.tokenizer.chat_template == tokenizer.chat_template
    assert base.model.generation_config.eos_token_id == tokenizer.eos_token_id


# --- training --------------------------------------------------------------------------------------------------------


def test_a_base_without_any_end_is_refused(tokenizer) -> None:
    own = of(tokenizer, "{% for m in messages %}{{ m.content }}\n{% endfor %}")
    own.eos_token = None
    with pytest.raises(UserError, match=r"its tokenizer has no eos_token"):
        data.conversation_example(own, PLAIN)


@pytest.fixture
def rewriting(tiny: Path, tmp_path: Path) -> Path:
    """The tiny model with a template that marks its last turn, as reasoning models' do."""
    folder = tmp_path / "rewriting"
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    tokenizer.chat_template = (
        "{{ bos_token }}{% for m in messages %}<|{{ m.role }}|>{% if m.role == 'assistant' and loop.last %}So: {% endif %}"
        "{{ m.content }}<|end|>{% endfor %}{% if add_generation_prompt %}<|assistant|>So: {% endif %}"
    )
    folder.mkdir()
    for file in tiny.iterdir():
        if file.suffix in (".json", ".safetensors") and "tokenizer" not in file.name:
            (folder / file.name).write_bytes(file.read_bytes())
    tokenizer.save_pretrained(folder)
    return folder


def test_a_conversation_in_several_sequences_is_one_sample(cell, rewriting: Path, tmp_path: Path) -> None:
    talks = [
        [user(f"Name fruit {i}."), assistant("An apple."), user("Another?"), assistant(f"A pear, {i} of them.")][: 2 + 2 * (i % 3 > 0)]
        for i in range(12)
    ]  # fmt: skip
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"chosen": talk}) + "\n" for talk in talks))
    weights = {}
    for name, more in {"packed": [], "padded": ["recipe.packing=padded"], "small": ["recipe.micro_batch=1"]}.items():
        c = cell(
            "n=0", "m=12", f"model.path={rewriting}", "model.name=tiny", f"warmup.data.path={rows}", "recipe.batch=4",
            "recipe.micro_batch=4", "recipe.lora.dropout=0", "task.benchmark={}", f"output={tmp_path / name}", *more,
        )  # fmt: skip
        store = do(c)
        record = json.loads((store.folder(c.chain.warmup) / "record.json").read_text())
        assert record["data"]["samples"] == record["metrics"]["samples_seen"] == 12
        assert record["metrics"]["steps"] == 3
        weights[name] = adapter(c)
    for other in ("padded", "small"):
        for key, value in weights["packed"].items():
            assert torch.allclose(value, weights[other][key], atol=1e-5), (other, key)


def test_rendered_rows_train_what_plain_ones_do(cell, tiny: Path, tokenizer, tmp_path: Path) -> None:
    talks = [
        [user(f"Name fruit {i}."), assistant("An apple."), user("Another?"), assistant(f"A pear, {i}.")]
        for i in range(8)
    ]
    texts = [tokenizer.apply_chat_template(talk, tokenize=False) for talk in talks]
    weights = []
    for name, rows, more in (("plain", talks, []), ("rendered", texts, ["+warmup.rendered=true"])):
        file = tmp_path / f"{name}.jsonl"
        file.write_text("".join(json.dumps({"chosen": row}) + "\n" for row in rows))
        c = cell(
            "n=0", "m=8", f"model.path={tiny}", "model.name=tiny", f"warmup.data.path={file}", "task.benchmark={}",
            f"output={tmp_path / 'out'}", *more,
        )  # fmt: skip
        do(c)
        weights.append(adapter(c))
    assert all(torch.equal(value, weights[1][key]) for key, value in weights[0].items())


@pytest.mark.parametrize("spelling", [json.dumps, repr])
def test_a_conversation_in_a_cell_is_read(tokenizer, spelling) -> None:
    talk = [user(), assistant()]
    assert data.conversation_example(tokenizer, spelling(talk)) == data.conversation_example(tokenizer, talk)


@pytest.mark.parametrize("text", ["\u200b", "\ufeff\n"])
def test_a_turn_in_which_nothing_can_be_seen_is_blank(tokenizer, text: str) -> None:
    with pytest.raises(LeftOut, match="blank turn"):
        data.conversation_example(tokenizer, [user(), assistant(text)])
