"""What moving an exact task vector from one alpha to the next costs: every weight, in place.

    python benchmarks/moves.py --random
    python benchmarks/moves.py --model Qwen/Qwen2.5-0.5B --other Qwen/Qwen2.5-0.5B-Instruct

Prints one JSON line: seconds and GB/s of a move (both ends read and the model written, 6 bytes a weight in 16 bits), the
card's or the memory's copy rate in the same process, and the seconds of loading the model again instead. `checked`
says that a move gave the bits of the fp32 formula, rounded once, and the way back the base's own.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
SHAPE = {
    "vocab_size": 151936, "hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28, "num_attention_heads": 12,
    "num_key_value_heads": 2, "max_position_embeddings": 32768, "rms_norm_eps": 1e-6, "tie_word_embeddings": True,
}  # fmt: skip


def main() -> None:
    """Times the moves of one pair."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--model", help="theta1: a folder, a hub id or an embedded name")
    what.add_argument("--random", action="store_true", help="random weights in the shape of Qwen2.5-1.5B")
    parser.add_argument("--other", default="", help="theta2, with --model")
    parser.add_argument("--moves", type=int, default=10)
    parser.add_argument("--layers", type=int, default=28, help="with --random")
    args = parser.parse_args()
    if args.model and not args.other:
        parser.error("--model needs --other, the checkpoint at alpha 1")
    with tempfile.TemporaryDirectory() as folder:
        pair = random_pair(Path(folder), args.layers) if args.random else (args.model, args.other)
        print(json.dumps(measure(*pair, args.moves)))


def measure(base: str, other: str, count: int) -> dict[str, Any]:
    """Loads the pair and moves it `count` times."""
    import torch

    from cotvalve.checkpoints import load_model, pick_device
    from cotvalve.mover import Mover
    from cotvalve.taskvector import TaskVector

    device = pick_device()
    done = torch.cuda.synchronize if device.type == "cuda" else lambda: None

    def took(work: Any) -> float:
        done()
        began = time.perf_counter()
        work()
        done()
        return time.perf_counter() - began

    model = load_model(base, device=device)
    before = [tensor.clone() for tensor in model.parameters()]
    vector = TaskVector.between(base, other)
    began = time.perf_counter()
    mover = Mover(vector, model)
    mover.to(0.5)
    done()
    first = time.perf_counter() - began
    seconds = [took(lambda i=i: mover.to(0.1 + 0.07 * i)) for i in range(count)]
    mover.to(0.7)
    state = model.state_dict()
    exact = all(torch.equal(state[name], vector.at(name, 0.7, device).to(state[name].dtype)) for name in vector.moves)
    mover.to(0.0)
    checked = all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    del before
    values = sum(tensor.numel() for tensor in model.parameters())
    size = min(values * model.dtype.itemsize // 2, 2 << 30)
    a = torch.empty(size, dtype=torch.uint8, device=device)
    b = torch.empty_like(a)
    b.copy_(a)
    copy = 2 * size / min(took(lambda: b.copy_(a)) for _ in range(5))
    again = took(lambda: load_model(base, device=device))
    moved = 3 * values * model.dtype.itemsize
    return {
        "weights": values, "dtype": str(model.dtype), "device": torch.cuda.get_device_name() if device.type == "cuda" else f"cpu, {torch.get_num_threads()} threads",
        "torch": torch.__version__, "ends_beside_the_model": mover.vector is not vector, "first_s": round(first, 3),
        "move_s": round(min(seconds), 5), "moves_s": [round(s, 5) for s in seconds], "gb_per_second": round(moved / min(seconds) / 1e9, 1),
        "copy_gb_per_second": round(copy / 1e9, 1), "of_copy": round(moved / min(seconds) / copy, 3), "load_again_s": round(again, 3), "checked": checked and exact,
    }  # fmt: skip


def random_pair(folder: Path, layers: int) -> tuple[str, str]:
    """Two checkpoints of random weights."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    for seed, name in enumerate(("theta1", "theta2")):
        torch.manual_seed(seed)
        torch.set_default_dtype(torch.bfloat16)
        with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
            model = Qwen2ForCausalLM(Qwen2Config(**SHAPE | {"num_hidden_layers": layers}))
        torch.set_default_dtype(torch.float32)
        model.to("cpu").save_pretrained(folder / name)
    return str(folder / "theta1"), str(folder / "theta2")


if __name__ == "__main__":
    main()
