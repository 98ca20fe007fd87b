"""Tokens drawn a second: the local engine beside plain `generate` of transformers, on the same requests.

    python benchmarks/sampling.py --model FOLDER_OR_HUB_ID [--data ../shared/data/pandalm-human/pairs.jsonl.gz]
    python benchmarks/sampling.py --quick

Requests are n completions of each of some prompts of mixed length, which the model ends itself or which are cut at the same
length. `engine` draws them all in one call. `generate` is called with as many prompts as fill its batch, of like length, padded
on the left, with num_return_sequences = n; a batch ends with its longest completion. Both draw at temperature 1 from the whole
vocabulary, with the same model, dtype, threads and batch size. Each turn has seeds of its own; a conductor lets them take one
turn each, so that both see the same state of the machine. Completions are counted with the token that ends them, and without
what `generate` pads. --quick: a tiny random model, under a minute. Writes sampling.json to --output_dir.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from conductor import begin, conditions, expect, keep, take_turns

CONTESTANTS = ("engine", "generate")
TARGET = 1.5

Draw = Callable[[Sequence[Any], int], list[int]]
"""Completions of prompts under a seed: the number of tokens of each."""


def main() -> None:
    arguments = parse_arguments()
    workers = {}
    for name in CONTESTANTS:
        workers[name] = begin(work, name, arguments)
        print(f"{name}: {expect(workers[name][1], 'ready')}", flush=True)
    started = time.perf_counter()
    timings, _ = take_turns(workers, arguments)
    result = {
        "command": "python benchmarks/sampling.py "
        + ("--quick" if arguments.quick else f"--model {Path(arguments.model).name}"),
        **conditions(arguments.threads, "torch", "transformers", "polyref"),
        "minutes": round((time.perf_counter() - started) / 60, 1),
        **{name: getattr(arguments, name) for name in ("prompts", "n", "max_new_tokens", "batch_size", "steps")},
        **summary(timings),
    }
    keep(result, Path(arguments.output_dir) / "sampling.json")
    print(json.dumps(result, indent=2))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--data", default="../shared/data/pandalm-human/pairs.jsonl.gz")
    parser.add_argument("--prompts", type=int, default=12, help="of a turn")
    parser.add_argument("--n", type=int, default=8, help="completions of each")
    parser.add_argument("--max_new_tokens", type=int, default=96)
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--steps", type=int, default=3, help="turns of each contestant")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output_dir", default=str(Path(__file__).parent / "results"))
    arguments = parser.parse_args()
    if arguments.quick == (arguments.model is not None):
        parser.error("give --model, or --quick")
    if arguments.batch_size % arguments.n:
        parser.error("batch_size is no multiple of n: the batches of generate would not be full")
    arguments.warmup = 0  # a worker draws once before it is ready
    return arguments


def work(name: str, connection: Connection, arguments: argparse.Namespace) -> None:
    try:
        os.environ["OMP_NUM_THREADS"] = str(arguments.threads)
        os.environ["HF_HUB_OFFLINE"] = "1"
        import torch
        import transformers

        transformers.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        torch.set_num_threads(arguments.threads)
        model, tokenizer, prompts = tiny(arguments.prompts) if arguments.quick else real(arguments)
        draw = {"engine": engine, "generate": plain}[name](model, tokenizer, arguments)
        draw(prompts[:1], -1)
        connection.send(("ready", f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f}M parameters"))
        for turn in range(arguments.steps):
            connection.recv()
            start = time.perf_counter()
            lengths = draw(prompts, turn)
            seconds = time.perf_counter() - start
            assert len(lengths) == len(prompts) * arguments.n and 0 < max(lengths) <= arguments.max_new_tokens
            connection.send(("step", {"seconds": seconds, "tokens": sum(lengths), "completions": len(lengths)}))
        connection.recv()
        connection.send(("final", {}))
    except BaseException as error:
        connection.send(("error", f"{name}: {type(error).__name__}: {error}"))
        raise


def real(arguments: argparse.Namespace) -> tuple[Any, Any, list[Any]]:
    """A model, and prompts of its data from the shortest to the longest, as one message each."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from polyref import load_preferences

    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32)
    texts = {record.prompt for record in load_preferences(arguments.data) if isinstance(record.prompt, str)}
    by_length = sorted(texts, key=lambda text: (len(text), text))
    chosen = by_length[:: max(len(by_length) // arguments.prompts, 1)][: arguments.prompts]
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    return model, tokenizer, [({"role": "user", "content": text},) for text in chosen]


def tiny(prompts: int) -> tuple[Any, Any, list[Any]]:
    """A random Llama that ends a completion about every 40 tokens, and prompts of 1 to 60 words."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = ["<end>", *(f"w{i}" for i in range(40))]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="w0"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>", pad_token="<end>")
    torch.manual_seed(0)
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(words), eos_token_id=0, pad_token_id=0, bos_token_id=1, **sizes))
    return model.eval(), tokenizer, [" ".join(f"w{(i * k) % 40}" for k in range(1 + i * 59 // prompts)) for i in range(prompts)]


def engine(model: Any, tokenizer: Any, arguments: argparse.Namespace) -> Draw:
    """One call of the engine."""
    from polyref.samplers.engine import SamplingParameters
    from polyref.samplers.local import LocalEngine

    drawing = LocalEngine(model, tokenizer, batch_size=arguments.batch_size)
    parameters = SamplingParameters(arguments.max_new_tokens)

    def draw(prompts: Sequence[Any], turn: int) -> list[int]:
        drawn = drawing(prompts, arguments.n, parameters, seed=turn)
        return [len(completion.token_ids) for row in drawn for completion in row]

    return draw


def plain(model: Any, tokenizer: Any, arguments: argparse.Namespace) -> Draw:
    """`generate`, a batch after the other, with the tokens that the engine would read."""
    import torch

    from polyref.samplers.local import LocalEngine

    reading = LocalEngine(model, tokenizer)
    ends = torch.tensor(sorted(reading.ends))
    options = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "max_new_tokens": arguments.max_new_tokens}
    options |= {"num_return_sequences": arguments.n, "eos_token_id": ends.tolist(), "pad_token_id": int(ends[0])}

    def draw(prompts: Sequence[Any], turn: int) -> list[int]:
        torch.manual_seed(turn)
        ids = sorted((reading.prompt_ids(prompt) for prompt in prompts), key=len)
        at_once, lengths = arguments.batch_size // arguments.n, list[int]()
        for some in (ids[i : i + at_once] for i in range(0, len(ids), at_once)):
            longest = max(map(len, some))
            tokens = torch.tensor([[0] * (longest - len(row)) + list(row) for row in some])
            mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in some])
            drawn = model.generate(input_ids=tokens, attention_mask=mask, **options)[:, longest:]
            ended = torch.isin(drawn, ends).long()
            before = ended.cumsum(1) - ended  # 0 up to and with the first token that ends
            lengths += (before == 0).sum(1).tolist()
        return lengths

    return draw


def summary(timings: dict[str, list[dict[str, float]]]) -> dict[str, Any]:
    """Tokens a second of each contestant, and their ratio turn by turn."""
    rates = {name: [turn["tokens"] / turn["seconds"] for turn in turns] for name, turns in timings.items()}
    ratios = [ours / theirs for ours, theirs in zip(rates["engine"], rates["generate"], strict=True)]
    contestants = {
        name: {
            "tokens_per_second": {"median": statistics.median(rates[name]), "low": min(rates[name]), "high": max(rates[name])},
            "seconds": sum(turn["seconds"] for turn in turns),
            "mean_tokens": sum(turn["tokens"] for turn in turns) / sum(turn["completions"] for turn in turns),
        }
        for name, turns in timings.items()
    }
    ratio = {"median": statistics.median(ratios), "low": min(ratios), "high": max(ratios)}
    return {"contestants": contestants, "ratio": ratio, "target": TARGET}


if __name__ == "__main__":
    main()
