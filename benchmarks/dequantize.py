"""The reproduction's base: a Qwen2.5 GGUF file as a folder of bf16 safetensors, with embeddings tied as in the original.

    python benchmarks/dequantize.py qwen2.5-coder-1.5b-instruct-q4_k_m.gguf models/Qwen/Qwen2.5-Coder-1.5B-Instruct
    cd models && cotvalve run .../recipes/reproduction/main.yaml

llama.cpp stores the table of a small Qwen2.5 twice: coarsely for the input, finely for the output. The original has one
table, so the finer copy becomes both; loading the GGUF file itself leaves two, which is another model with another
fingerprint. Every value is gguf's own dequantization, rounded to bf16, which is what transformers makes of the file; tensors
are converted side by side, in as many processes as there are processors.
"""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from transformers import AutoConfig, AutoTokenizer

from cotvalve.errors import CotvalveError, DataError
from cotvalve.records import disk
from cotvalve.weights import Checkpoint, fingerprint

NAMES = {
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
}  # fmt: skip
"""llama.cpp's names of a layer's parts, and transformers'."""
AT_ONCE = 1 << 22
"""Values that a process converts in one go."""


def convert(source: Path, folder: Path) -> Path:
    """Writes weights, config and tokenizer into `folder`; returns it. Raises DataError as `weights` does."""
    weights(source, folder)
    config = AutoConfig.from_pretrained(source.parent, gguf_file=source.name)
    config.tie_word_embeddings = True
    config.save_pretrained(folder)
    AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name).save_pretrained(folder)
    return folder


def weights(source: Path, folder: Path, processes: int | None = None) -> Path:
    """Writes `model.safetensors` into `folder`, in as many processes as there are processors; returns its path.

    Raises DataError for a file of another architecture, or one without the second copy of the table.
    """
    try:
        reader = gguf.GGUFReader(source)
    except (OSError, ValueError) as error:
        raise DataError(f"{source}: no GGUF file ({error})") from None
    held = {tensor.name: tensor for tensor in reader.tensors}
    if (made := reader.fields["general.architecture"].contents()) != "qwen2":
        raise DataError(f"{source}: architecture {made}; only qwen2 is converted here, load others with --gguf-file")
    if "output.weight" not in held:
        raise DataError(f"{source}: has one table already; load it with --gguf-file")
    of = {theirs(name): tensor for name, tensor in held.items() if name != "token_embd.weight"}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in of.items():
        start, end = end, end + 2 * int(np.prod(tensor.shape))
        header[name] = {"dtype": "BF16", "shape": [int(n) for n in reversed(tensor.shape)], "data_offsets": [start, end]}
    raw = json.dumps(header).encode()
    raw += b" " * (-len(raw) % 8)
    with disk(folder):
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "model.safetensors"
        with path.open("wb") as file:
            file.write(len(raw).to_bytes(8, "little") + raw)
            file.truncate(8 + len(raw) + end)
    parts: list[Part] = []
    for name, tensor in of.items():
        # A row of the file's blocks is a row of the tensor; a vector is one row.
        width, rows = int(tensor.shape[0]), len(tensor.data) if tensor.data.ndim > 1 else 1
        step, begin = max(1, AT_ONCE // width), 8 + len(raw) + header[name]["data_offsets"][0]
        parts += [(name, row, min(rows, row + step), begin + 2 * row * width) for row in range(0, rows, step)]
    # Forked processes have the mapped file as it is here, and nothing is sent to them but where to look.
    with ProcessPoolExecutor(processes or os.cpu_count(), get_context("fork"), _hold, (of, path)) as pool:
        list(pool.map(_write, parts, chunksize=4))
    return path


Part = tuple[str, int, int, int]
"""A tensor's name, the rows of it from and to, and where they begin in the file that is written."""
_held: dict[str, Any] = {}


def _hold(of: dict[str, gguf.ReaderTensor], path: Path) -> None:
    torch.set_num_threads(1)
    _held.update(of=of, path=path)


def _write(part: Part) -> None:
    name, row, last, begin = part
    tensor = _held["of"][name]
    rows = tensor.data[row:last] if tensor.data.ndim > 1 else tensor.data
    values = torch.tensor(gguf.quants.dequantize(rows, tensor.tensor_type), dtype=torch.float32)
    with _held["path"].open("r+b") as file:
        file.seek(begin)
        file.write(values.to(torch.bfloat16).view(torch.int16).numpy().tobytes())


def theirs(name: str) -> str:
    """transformers' name of a tensor that llama.cpp calls `name`."""
    if name in (whole := {"output.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}):
        return whole[name]
    _, layer, part, kind = name.split(".")
    return f"model.layers.{layer}.{NAMES[part]}.{kind}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Converts, and prints the fingerprint that directions of this base carry."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="the GGUF file")
    parser.add_argument("folder", type=Path, help="where config, tokenizer and weights go")
    given = parser.parse_args(arguments)
    try:
        folder = convert(given.source, given.folder)
        print(f"{folder}: base_sha256 {fingerprint(Checkpoint(folder))}")
    except CotvalveError as error:
        sys.exit(f"dequantize: {error}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
