"""Train the demo model on this repository's documentation and write its package data.

    python tools/train_demo_model.py --minutes 20

needs torch and transformers, as the CPU environment of the project has them. It
writes tokenizer.json, config.json and model.safetensors into vllm_pd/demo/data,
checks that transformers computes the same from the written files, and prints
what the model says. The corpus and the batches depend on --seed only; with
--steps instead of --minutes the whole run is repeatable on the same machine.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import random
import re
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers
from tokenizers import pre_tokenizers, trainers

from vllm_pd.demo.checkpoint import (
    PAD_ID,
    SPECIAL_TOKENS,
    VOCAB_SIZE,
    Geometry,
    model_config,
    tensor_shapes,
    write_safetensors,
)
from vllm_pd.demo.conversation import (
    GLOSSARY,
    OFF_TOPIC,
    OPENING,
    SMALL_TALK,
    SYSTEM_PROMPTS,
    UNKNOWN_TOPICS,
    WHAT_IT_IS,
    phrasings,
)
from vllm_pd.demo.corpus import Corpus, read_corpus
from vllm_pd.demo.model import DEMO_MARK

ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT / "vllm_pd" / "demo" / "data"
GEOMETRY = Geometry(
    hidden_size=256, num_layers=4, num_heads=4, num_kv_heads=2, intermediate_size=768
)
TRAINED_STD = 0.02
WINDOWS = ((16, 128), (8, 256), (8, 256), (8, 256), (4, 512), (2, 1024))
"""Batch size and length of the training steps, in turn: always 2,048 tokens."""
PEAK_LR = 6e-3
WARMUP_STEPS = 30
IGNORED = -100  # label of tokens that are read but not learned

logger = logging.getLogger("train_demo_model")


# --- Tokenizer -------------------------------------------------------------------------------


def train_tokenizer(texts: list[str]) -> tokenizers.Tokenizer:
    """Learn a byte-level BPE of exactly ``VOCAB_SIZE`` tokens; every byte is one of them.

    Normalisation and word boundaries are those of Qwen2, because transformers
    applies them to every model of that type, whatever tokenizer.json says.
    """
    qwen2: Any = transformers.Qwen2Tokenizer()
    tokenizer: tokenizers.Tokenizer = qwen2.backend_tokenizer
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        min_frequency=2,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    # A small corpus has fewer merges; the engine may still sample every id.
    spare = VOCAB_SIZE - tokenizer.get_vocab_size()
    tokenizer.add_tokens([f"<|spare_{i}|>" for i in range(spare)])
    return tokenizer


# --- Samples ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Exchange:
    """Ways to ask, and the answer."""

    questions: tuple[str, ...]
    answer: str


def make_exchanges(corpus: Corpus) -> list[Exchange]:
    """Return all questions and answers; those that come up more often, several times."""
    talk = [Exchange(questions, answer) for questions, answer in SMALL_TALK]
    glossary = [Exchange(phrasings(name), answer) for name, answer in GLOSSARY]
    unknown = [
        Exchange(phrasings(name), OFF_TOPIC)
        for name in (*UNKNOWN_TOPICS, *invented_words(len(UNKNOWN_TOPICS)))
    ]
    seen = {re.sub("^(a|the) ", "", name.lower()) for name, _ in GLOSSARY}
    seen |= {question.lower().strip("?!.") for questions, _ in SMALL_TALK for question in questions}
    topics: list[Exchange] = []
    for topic in corpus.topics:  # a name that means several things keeps its first answer
        if topic.name.lower() not in seen:
            seen.add(topic.name.lower())
            topics.append(Exchange(phrasings(topic.name), topic.answer))
    return topics + 6 * talk + 4 * glossary + unknown


def invented_words(count: int) -> list[str]:
    """Return words that mean nothing, so that what is unknown is not a list to be learned."""
    rng = random.Random(count)
    syllables = [first + vowel for first in "bdfgklmnprstvz" for vowel in "aeiou"]
    return ["".join(rng.choices(syllables, k=rng.choice((2, 3)))) for _ in range(count)]


class Samples:
    """Endless training windows: half running text, half chat."""

    def __init__(
        self,
        tokenizer: tokenizers.Tokenizer,
        corpus: Corpus,
        exchanges: list[Exchange],
        seed: int,
    ) -> None:
        self._tokenizer = tokenizer
        self._exchanges = exchanges
        self._rng = random.Random(seed)
        general = "\n\n".join((OPENING, WHAT_IT_IS, *(answer for _, answer in GLOSSARY)))
        self._documents = [*corpus.documents, general]
        self._sentences = self._find(r"(?:^|(?<=[.!?] )|(?<=\n))(?=\S)")
        self._words = self._find(r"(?<=\s)(?=\S)")
        last = len(self._documents) - 1
        self._general = [start for start in self._sentences if start[0] == last]
        self._chat = self._chat_stream()

    def _find(self, pattern: str) -> list[tuple[int, int]]:
        """Return document and character position of all matches."""
        return [
            (i, match.start())
            for i, document in enumerate(self._documents)
            for match in re.finditer(pattern, document)
        ]

    def batch(self, rows: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return inputs and labels, each [rows, length]."""
        ids, labels = zip(
            *(self._text_row(length) if i % 2 else self._chat_row(length) for i in range(rows)),
            strict=True,
        )
        return torch.tensor(ids), torch.tensor(labels)

    def single_turns(self, count: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield conversations of one question each, as inputs and labels of one row."""
        for exchange in self._rng.sample(self._exchanges, min(count, len(self._exchanges))):
            ids, labels = self._conversation([exchange])
            yield torch.tensor([ids]), torch.tensor([labels])

    def _text_row(self, length: int) -> tuple[list[int], list[int]]:
        row: list[int] = []
        while len(row) < length:
            # Prompts mostly begin where a sentence does, and often with the main terms.
            starts = self._rng.choices(
                (self._sentences, self._words, self._general), weights=(6, 3, 1)
            )[0]
            i, position = self._rng.choice(starts)
            text = self._documents[i][position : position + 8 * length]  # more than is needed
            row += [*self._tokenizer.encode(text).ids, PAD_ID]
        return row[:length], row[:length]

    def _chat_row(self, length: int) -> tuple[list[int], list[int]]:
        ids: list[int] = []
        labels: list[int] = []
        while len(ids) < length:  # every row begins with a conversation, as requests do
            more_ids, more_labels = next(self._chat)
            ids += more_ids
            labels += more_labels
        return ids[:length], labels[:length]

    def _chat_stream(self) -> Iterator[tuple[list[int], list[int]]]:
        while True:
            pending = [(exchange, self._rng.random()) for exchange in self._exchanges]
            self._rng.shuffle(pending)
            while pending:
                turns = [
                    pending.pop() for _ in range(min(self._rng.choice((1, 1, 2)), len(pending)))
                ]
                yield self._conversation([exchange for exchange, _ in turns])

    def _conversation(self, turns: list[Exchange]) -> tuple[list[int], list[int]]:
        ids: list[int] = []
        labels: list[int] = []
        if self._rng.random() < 0.25:
            system = f"<|im_start|>system\n{self._rng.choice(SYSTEM_PROMPTS)}<|im_end|>\n"
            ids += self._tokenizer.encode(system).ids
            labels += [IGNORED] * len(ids)
        for turn in turns:
            question = self._rng.choice(turn.questions)
            if self._rng.random() < 0.2:  # people write "Hi" and "hi"
                question = question[0].swapcase() + question[1:]
            asked = f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
            asked_ids = self._tokenizer.encode(asked).ids
            answer_ids = self._tokenizer.encode(f"{turn.answer}<|im_end|>\n").ids
            ids += asked_ids + answer_ids
            labels += [IGNORED] * len(asked_ids) + answer_ids
        return ids, labels


# --- Training --------------------------------------------------------------------------------


def make_model(seed: int) -> Any:
    """Return an untrained ``Qwen2ForCausalLM`` in float32."""
    torch.manual_seed(seed)
    config = transformers.Qwen2Config(**_config(TRAINED_STD) | {"dtype": "float32"})
    model_class: Any = transformers.Qwen2ForCausalLM
    return model_class(config)


def _config(init_range: float) -> dict[str, Any]:
    config = model_config(GEOMETRY, tied=True)
    return config | {"initializer_range": init_range, DEMO_MARK: 1}


def learning_rate(step: int, progress: float) -> float:
    """Return the rate: a linear warm-up, then a cosine down to a hundredth."""
    warmup = min(1.0, (step + 1) / WARMUP_STEPS)
    return PEAK_LR * warmup * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * progress)))


def make_optimizers(model: Any) -> list[torch.optim.Optimizer]:
    """Return Muon for the layers' matrices, which then need half as many steps, AdamW for the rest.

    Both take the same learning rate.
    """
    matrices: list[torch.nn.Parameter] = []
    others: list[torch.nn.Parameter] = []
    for name, parameter in model.named_parameters():
        inside = parameter.ndim == 2 and "layers" in name
        (matrices if inside else others).append(parameter)
    return [
        torch.optim.Muon(matrices, weight_decay=0.02, ns_steps=3, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, weight_decay=0.0, betas=(0.9, 0.98), fused=True),
    ]


def train(model: Any, samples: Samples, args: argparse.Namespace) -> float:
    """Train until the budget is spent; return the mean loss of the last 50 steps."""
    optimizers = make_optimizers(model)
    started = time.monotonic()
    recent: list[float] = []
    step = 0
    while (progress := _progress(step, started, args)) < 1.0:
        for group in (group for optimizer in optimizers for group in optimizer.param_groups):
            group["lr"] = learning_rate(step, progress)
        ids, labels = samples.batch(*WINDOWS[step % len(WINDOWS)])
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
        loss: Any = torch.nn.functional.cross_entropy(
            logits.float().flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED
        )
        model.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        recent = [*recent[-49:], loss.item()]
        step += 1
        if step % 50 == 0:
            rate = step * 2048 / (time.monotonic() - started)
            mean = sum(recent) / len(recent)
            logger.info(
                "step %d  %.0f %%  loss %.3f  %.0f tokens/s", step, progress * 100, mean, rate
            )
    return sum(recent) / max(1, len(recent))


def _progress(step: int, started: float, args: argparse.Namespace) -> float:
    """Return the fraction of the budget that is spent."""
    done: float = step if args.steps is not None else (time.monotonic() - started) / 60
    budget: float = args.steps if args.steps is not None else args.minutes
    return done / budget if budget > 0 else 1.0


# --- Result ----------------------------------------------------------------------------------


def save(model: Any, tokenizer: tokenizers.Tokenizer, folder: Path) -> None:
    """Write the files that depend on the training; the others are kept by hand."""
    config = _config(TRAINED_STD)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    weights = model.state_dict()
    shapes = tensor_shapes(config)
    path = folder / "model.safetensors"
    path.unlink(missing_ok=True)
    tensors = ((name, weights[name].float().numpy()) for name in shapes)
    write_safetensors(path, shapes, GEOMETRY.dtype, tensors)


def verify(model: Any, folder: Path) -> Any:
    """Load what was written with transformers and compare it with the trained model."""
    loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = torch.arange(256).view(1, -1)
    with torch.no_grad():
        want, got = model(input_ids=ids).logits, loaded(input_ids=ids).logits
    error = ((want - got).norm() / want.norm()).item()
    logger.info("relative difference of the logits after rounding to bfloat16: %.4f", error)
    if error > 0.05:
        raise SystemExit("the written checkpoint computes something else than the trained model")
    return loaded.eval()


PROMPTS = (
    "Disaggregated prefill-decode serving",
    "A prefill instance",
    "The router",
    "The KV cache",
    "When a prefill instance dies,",
)
QUESTIONS = (
    "What is vllm-pd?",
    "hello",
    "who are you",
    "What is lease_s?",
    "How do I start the service?",
    "What does the router do?",
    "How do I stop the service?",
    "What is an apple?",
)


def recall(model: Any, samples: Samples, count: int = 200) -> float:
    """Return the fraction of questions whose whole answer is right, greedily."""
    right = asked = 0
    for ids, labels in samples.single_turns(count):
        with torch.no_grad():
            said = model(input_ids=ids).logits[:, :-1].argmax(-1)
        wanted = labels[:, 1:]
        right += int(((said == wanted) | (wanted == IGNORED)).all())
        asked += 1
    return right / max(1, asked)


def print_samples(model: Any, folder: Path) -> None:
    """Log greedy continuations and answers."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    chats = [[{"role": "user", "content": question}] for question in QUESTIONS]
    rendered = [
        tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        for chat in chats
    ]
    for shown, prompt in [
        *zip(PROMPTS, PROMPTS, strict=True),
        *zip(QUESTIONS, rendered, strict=True),
    ]:
        inputs = tokenizer(prompt, return_tensors="pt")
        output = model.generate(
            **inputs, max_new_tokens=100, do_sample=False, temperature=None, top_p=None
        )
        text = tokenizer.decode(output[0, inputs.input_ids.shape[1] :], skip_special_tokens=True)
        logger.info("\n>>> %s\n%s", shown, text)


def main() -> None:
    """Run the whole training."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=20.0, help="training time")
    parser.add_argument("--steps", type=int, help="steps of 2,048 tokens, instead of --minutes")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--corpus",
        type=Path,
        action="append",
        default=[],
        help="a further Markdown file, for trials",
    )
    parser.add_argument("--output", type=Path, default=DATA)
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)  # before the work, not after it
    for name in ("tokenizer_config.json", "generation_config.json"):  # written by hand
        if not (args.output / name).exists():
            shutil.copy(DATA / name, args.output)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    transformers_logging: Any = transformers.utils.logging
    transformers_logging.disable_progress_bar()
    torch.set_num_threads(args.threads)

    corpus = read_corpus(ROOT, args.corpus)
    exchanges = make_exchanges(corpus)
    # One question each: the same words in every phrasing would use up the merges.
    questions = [exchange.questions[0] for exchange in exchanges]
    tokenizer = train_tokenizer([*corpus.documents, *questions, *(e.answer for e in exchanges)])
    samples = Samples(tokenizer, corpus, exchanges, args.seed)
    model = make_model(args.seed)
    logger.info(
        "%d characters, %d topics, %d exchanges, %d parameters",
        sum(len(document) for document in corpus.documents),
        len(corpus.topics),
        len(exchanges),
        sum(p.numel() for p in model.parameters()),
    )
    model.train()
    loss = train(model, samples, args)
    model.eval()
    save(model, tokenizer, args.output)
    written = verify(model, args.output)
    print_samples(written, args.output)
    logger.info("final loss %.3f, answers recalled %.0f %%", loss, 100 * recall(written, samples))


if __name__ == "__main__":
    main()
