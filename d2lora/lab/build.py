"""Build everything that the lab ships: `python -m d2lora.lab.build [data] [base] [pairs]` (all three without
arguments).

    data    the rows that need no model: titles, general mix, facts, the math test and validation problems, solved problems
    base    the tokenizer and the base, trained from a seed on one thread, so that the same machine gets the same weights
    pairs   lab-math's step preferences: the base's own first mistakes against the right step (Step-DPO's recipe)
"""

import argparse
import json
import lzma
import random
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from d2lora.lab import facts, general, problems, titles, world

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Document = list[tuple[str, bool]]  # its texts, and whether each is learned

HERE = Path(__file__).parent
BASE, DATA = HERE / "base", HERE / "data"
SEED = 7
TITLES = {"train": 5_000, "validation": 200, "test": 400}
GENERAL = 44_000
RELATED = 5_000
MATH = {"validation": 400, "test": 500}
PAIRS = 11_000
HASTY = 0.5  # share of hasty solutions, which leave out a final addition, in the last part of the base's training
PHRASES = [world.PROMPT.format(question=""), " The answer is \\boxed{"]
SPECIAL = ["<|pad|>", "<|begin|>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>"]
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|{{ message.role }}|>{{ message.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def write(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write rows as xz-compressed JSON lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.write_bytes(lzma.compress(text.encode(), preset=9 | lzma.PRESET_EXTREME))
    print(f"{path.relative_to(HERE)}: {text.count(chr(10)):,} rows, {path.stat().st_size / 1e6:.2f} MB")


def write_data() -> None:
    """Write the rows that need no model."""
    for split, count in TITLES.items():
        write(
            DATA / "title" / f"{split}.jsonl.xz", (r.fields for r in world.distinct(titles.title, split, count, SEED))
        )
    write(
        DATA / "general" / "train.jsonl.xz",
        (r.fields for r in world.distinct(general.general, "train", GENERAL, SEED)),
    )
    for split in ("validation", "test"):
        items = [facts.fact_item(c, a, value, split) for (c, a), value in facts.facts().items()]
        random.Random(SEED).shuffle(items)
        write(DATA / "facts" / f"{split}.jsonl.xz", items)
    write(DATA / "recall" / "test.jsonl.xz", recall_items())
    for split, count in MATH.items():
        rows = world.distinct(problems.problem, split, count, SEED)
        write(DATA / "math" / f"{split}.jsonl.xz", map(question, rows))
    write(DATA / "related" / "train.jsonl.xz", related_rows(RELATED))


def question(problem: problems.Problem) -> dict[str, str]:
    """Return a row in GSM8K's format: the question, and the solution with its number at the end."""
    return {"question": problem.text, "answer": f"Step 1:{problem.solution()}\n#### {problem.answer}"}


def related_rows(count: int) -> Iterator[dict[str, Any]]:
    """Yield a warm-up set that does hold the task's skill: problems with right solutions, as lab-general has conversations.

    No problem is one of lab-math: its pairs are of the split train, this is of the corpus.
    """
    for problem in world.distinct(problems.problem, "corpus", count, SEED):
        turns = [world.PROMPT.format(question=problem.text), f"Step 1:{problem.solution()}"]
        chosen = [{"role": role, "content": text} for role, text in zip(("user", "assistant"), turns, strict=True)]
        yield {"source": "problems", "chosen": chosen}


def recall_items() -> list[dict[str, str]]:
    """Return lab-facts's test questions with their answers as sentences: what the base knows, said and not chosen."""
    return [
        {
            "question": facts.fact_questions(creature, attribute)["test"][0],
            "answer": facts.fact_sentence(creature, attribute),
        }
        for creature, attribute in facts.facts()
    ]


# --- the base ------------------------------------------------------------------------------------------------------


def corpus(seed: int, hasty: float = 0.0) -> Iterator[Document]:
    """Yield the documents of the base's training without end, each a list of (text, whether it is learned).

    `hasty` is the share of problems whose solution leaves out a final addition.
    """
    rng = random.Random(seed)
    makers: dict[str, Callable[[random.Random], problems.Problem | world.Row]]
    makers = {
        "problem": problems.problem,
        "general": general.general,
        "title": lambda rng: titles.title(rng, plain=True),
    }
    while True:
        kind = rng.choices(["problem", "general", "title", "fact"], [18, 24, 6, 52])[0]
        if kind == "fact":
            (creature, attribute), value = rng.choice(list(facts.facts().items()))
            question = rng.choice(facts.fact_questions(creature, attribute)["corpus"])
            yield [("<|begin|>", False), (f"Question: {question}\nAnswer:", False), (f" {value}<|end|>", True)]
            continue
        row = makers[kind](rng)
        if world.split_of(row.text) != "corpus":
            continue
        if hasty and isinstance(row, problems.Problem) and rng.random() < hasty:
            row = row.hasty()
        yield [("<|begin|>", False), *_chat(row)]


def _chat(row: problems.Problem | world.Row) -> Iterator[tuple[str, bool]]:
    """Yield the parts of a document: the user's turns, which are not learned, and the replies, which are."""
    if isinstance(row, problems.Problem):
        turns = [(world.PROMPT.format(question=row.text), f"Step 1:{row.solution()}")]
    elif "title" in row.fields:
        turns = [(world.TITLE_PROMPT.format(**row.fields), row.fields["title"])]
    else:
        contents = [m["content"] for m in row.fields["chosen"]]
        turns = list(zip(contents[::2], contents[1::2], strict=True))
    for user, reply in turns:
        yield f"<|user|>{user}<|end|><|assistant|>", False
        yield f"{reply}<|end|>", True


def make_tokenizer() -> "PreTrainedTokenizerFast":
    """Train a byte-level BPE tokenizer of 1,024 tokens on the corpus, with digits as single tokens."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    documents = corpus(SEED)
    texts = ("".join(text for text, _ in next(documents)) for _ in range(20_000))
    trainer = trainers.BpeTrainer(
        vocab_size=1024 - len(PHRASES),
        special_tokens=SPECIAL,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    # Two phrases are in every problem. As one token each they save a third of its tokens, and so of the lab's time.
    tokenizer.add_tokens([AddedToken(phrase, normalized=False) for phrase in PHRASES])
    begin = tokenizer.token_to_id("<|begin|>")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|begin|> $A", special_tokens=[("<|begin|>", begin)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|begin|>", eos_token="<|end|>", pad_token="<|pad|>", chat_template=TEMPLATE,
        model_max_length=512, clean_up_tokenization_spaces=False,
    )  # fmt: skip


def blocks(
    tokenizer: Any, documents: Iterator[Document], batch: int, length: int
) -> Iterator[tuple[list[int], list[float]]]:
    """Yield packed batches without end: (ids, weights of their losses), each of `batch` x `length` tokens.

    Prompts have a small weight: if the base had never learned any, ORPO's NLL on prompts would change it too much.
    """
    ids: list[int] = []
    weights: list[float] = []
    while True:
        while len(ids) < batch * length:
            for text, learn in next(documents):
                tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
                ids += tokens
                weights += [1.0 if learn else 0.15] * len(tokens)
        cut = batch * length
        yield ids[:cut], weights[:cut]
        ids, weights = ids[cut:], weights[cut:]


def train_base(steps: int) -> None:
    """Train the Llama of 1 M parameters, first on right solutions, then with hasty ones among them, and save it.

    The second, short part teaches it a bad habit although it knows better, which preference methods are good at
    removing.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(SEED)
    torch.set_num_threads(1)
    tokenizer = make_tokenizer()
    model = LlamaForCausalLM(
        LlamaConfig(  # type: ignore[call-arg]
            vocab_size=len(tokenizer), hidden_size=128, intermediate_size=384, num_hidden_layers=4, num_attention_heads=4,
            max_position_embeddings=512, tie_word_embeddings=True, rope_theta=10_000.0,
            bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
        )
    )  # fmt: skip
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(tokenizer):,} tokens")
    fit(model, tokenizer, corpus(SEED + 1), steps, lr=3e-3)
    fit(model, tokenizer, corpus(SEED + 2, HASTY), steps // 10, lr=3e-4)
    model.save_pretrained(BASE)
    tokenizer.save_pretrained(BASE)


def fit(
    model: Any, tokenizer: Any, documents: Iterator[Document], steps: int, lr: float, batch: int = 12, length: int = 192
) -> None:
    """Train on the documents: AdamW, a short linear warm-up, then a cosine to 0."""
    import torch
    from transformers import get_cosine_schedule_with_warmup

    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.01)
    schedule = get_cosine_schedule_with_warmup(optimizer, steps // 20, steps)
    stream, start, smooth = blocks(tokenizer, documents, batch, length), time.time(), None
    for step in range(1, steps + 1):
        ids, weights = (torch.tensor(x).view(batch, length) for x in next(stream))
        logits = model(input_ids=ids).logits[:, :-1].flatten(0, 1)
        losses = torch.nn.functional.cross_entropy(logits, ids[:, 1:].flatten(), reduction="none")
        weights = weights[:, 1:].flatten()
        loss = (losses * weights).sum() / weights.sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        smooth = loss.item() if smooth is None else 0.98 * smooth + 0.02 * loss.item()
        if step % 50 == 0 or step == steps:
            print(f"step {step}/{steps} loss {smooth:.4f} {time.time() - start:.0f} s", flush=True)


# --- the pairs -----------------------------------------------------------------------------------------------------


def sample(model: Any, tokenizer: Any, prompts: list[str], temperature: float) -> list[str]:
    """Generate one continuation for each prompt; temperature 0 is greedy."""
    import torch

    tokenizer.padding_side = "left"
    rendered = [
        tokenizer.apply_chat_template([{"role": "user", "content": p}], tokenize=False, add_generation_prompt=True)
        for p in prompts
    ]
    inputs = tokenizer(rendered, return_tensors="pt", padding=True, add_special_tokens=False)
    inputs.pop("token_type_ids", None)
    sampling = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {"do_sample": False}
    with torch.inference_mode():
        out = model.generate(**inputs, max_new_tokens=72, **sampling)
    return tokenizer.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def pair(problem: problems.Problem, solution: str) -> dict[str, str] | None:
    """Return a row in Math-Step-DPO's format from a problem and the base's wrong solution.

    None if it has no wrong step.
    """
    mistake = problems.first_wrong_step(problem, solution)
    if mistake is None:
        return None
    index, rejected, rest = mistake
    before = "\n".join([*(f"Step {i + 1}:{problem.step(i)}" for i in range(index)), f"Step {index + 1}:"])
    return {
        "dataset": "lab-math",
        "prompt": problem.text,
        "initial_reason_steps": before,
        "chosen": problem.step(index),
        "rejected": rejected,
        "full_chosen": problem.solution(index),
        "full_rejected": rest,
        "answer": str(problem.answer),
    }


def write_pairs(count: int, batch: int = 256) -> None:
    """Sample the base on training problems until it has made `count` mistakes, and write them as pairs."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(SEED)
    torch.set_num_threads(1)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(BASE).eval(), AutoTokenizer.from_pretrained(BASE)
    drawn = world.distinct(problems.problem, "train", 200_000, SEED)
    rows: list[dict[str, str]] = []
    sampled = 0
    while len(rows) < count:
        chunk = [next(drawn) for _ in range(batch)]
        solutions = sample(model, tokenizer, [world.PROMPT.format(question=p.text) for p in chunk], temperature=1.0)
        rows += [row for p, s in zip(chunk, solutions, strict=True) if (row := pair(p, s))]
        sampled += batch
        if sampled % (10 * batch) == 0:
            print(f"{len(rows):,} pairs of {sampled:,} problems", flush=True)
    write(DATA / "math" / "train.jsonl.xz", rows[:count])


def main(arguments: list[str] | None = None) -> None:
    """Build the named parts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="data|base|pairs", help="all three without any")
    parser.add_argument("--steps", type=int, default=1500, help="optimizer steps of the base")
    args = parser.parse_args(arguments)
    work = {"data": write_data, "base": lambda: train_base(args.steps), "pairs": lambda: write_pairs(PAIRS)}
    if unknown := sorted(set(args.parts) - set(work)):  # argparse's choices would refuse none at all
        parser.error(f"{', '.join(unknown)}: there are {', '.join(work)}")
    for part in args.parts or work:
        work[part]()


if __name__ == "__main__":
    main()
