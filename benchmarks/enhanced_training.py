"""What R2D2's enhanced training (ET) saves: FLOPs at the paper's size, and time of a step at the demo's.

python -m benchmarks.enhanced_training
python -m benchmarks.enhanced_training --lengths 64 --rounds 20

With ET masked language modelling rides on the ranking forward of the positive pairs (R2D2, Sec. 3.2);
without, it has a forward of its own: text tower and text-image cross encoder on the masked text.
FLOPs: of a sample in a step of the paper's whole batch (64 ranks × 32) with all losses of Eq. 8 and ViT-L/14
at 224 px, forward and backward counted operator by operator on tensors without content. Image tower and
teacher have no backward. Attention counts as plain products: no kernel's recomputing. Texts are full.
Time: steps with AdamW at the demo's size, image tokens given as a frozen tower's cache gives them, one
thread, with and without ET in turns; the median of the pairs' ratios.
"""

import argparse
import functools
import statistics
import time
from typing import Any, NamedTuple

import torch
import yaml
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from demo.corpus import HERE
from learning import methods
from learning.methods.base import Batch, Method, Texts
from learning.model_files import without_weights

EQ_8 = ("gcpr_tgd", "fgr", "mlm", "fgd")
BATCH, VOCABULARY = 64 * 32, 21_128
LARGE: dict[str, Any] = {
    "method": "r2d2",
    "vision": {"name": "vit_large_patch14_clip_224", "image_px": 224, "trainable": False},
    "text": {"name": "bert_base"},
    "image_mask": {"at": "pixels", "patch_px": 14},
}
PAPER = {True: 154.0, False: 168.8}  # Sec. 4.3, "GFLOPs": with ET, without
PARTS = {
    "vision": "image tower, frozen: images, masked images",
    "text": "text tower",
    "teacher.text": "teacher's text tower",
    "ranking.image_text": "image-text cross encoder",
    "ranking.text_image": "text-image cross encoder",
    "mlm_head": "MLM head",
}
RECIPE = yaml.safe_load((HERE.parent / "recipes/r2d2_demo.yaml").read_text(encoding="utf-8"))
DEMO: dict[str, Any] = without_weights(RECIPE["model"])
DEMO_BATCH = int(RECIPE["stages"]["pretrain"]["contrastive_batch"])
DEMO_VOCABULARY, DEMO_LENGTHS = 3000, (8, 20)
WARM_UP = 2
PAPER_STEPS_PER_S = {True: 1.4, False: 1.1}


class Flops(NamedTuple):
    """GFLOPs of a sample; a multiply-add is two."""

    forward: float
    step: float  # forward and backward

    def less(self, other: "Flops") -> "Flops":
        return Flops(self.forward - other.forward, self.step - other.step)


class Counted(NamedTuple):
    """One setting of the method."""

    all: Flops
    parts: dict[str, float]  # GFLOPs of a forward, by `PARTS` and the rest
    text_pass: Flops  # of one text through the text tower


def build(values: dict[str, Any], enhanced: bool, losses: tuple[str, ...], vocabulary: int) -> Method:
    config = methods.parse_config({**values, "enhanced_training": enhanced})
    method = methods.build(config, losses, vocabulary)
    method.begin()
    return method


@functools.cache
def count(enhanced: bool, length: int, losses: tuple[str, ...] = EQ_8) -> Counted:
    """The paper's size, texts of `length` tokens."""
    values = {**LARGE, "text": {**LARGE["text"], "max_length": length}}
    with torch.device("meta"):
        method = build(values, enhanced, losses, VOCABULARY)
    with FakeTensorMode(allow_non_fake_inputs=True), sdpa_kernel(SDPBackend.MATH):
        method.to_empty(device="cpu")
        views = method.views()
        ones = torch.ones(BATCH, length, dtype=torch.int64)
        batch = Batch(
            {name: torch.empty(BATCH, 3, 224, 224) for name in views.images},
            {name: Texts(ones, ones) for name in views.texts},
            [str(number) for number in range(BATCH)],
            ids=torch.arange(BATCH),
        )
        with FlopCounterMode(display=False) as counter:
            total = torch.stack(list(method(batch).losses.values())).sum()
            modules = counter.get_flop_counts()
            parts = {part: gflops(sum(modules[f"R2D2.{part}"].values())) for part in PARTS}
            forward = gflops(counter.get_total_flops())
            total.backward()
        step = gflops(counter.get_total_flops())
        text: Any = method.text
        with FlopCounterMode(display=False) as counter:
            tokens = text(batch.texts["text"])
            text_forward = gflops(counter.get_total_flops())
            tokens.sum().backward()
        text_pass = Flops(text_forward, gflops(counter.get_total_flops()))
    parts["projections, losses"] = forward - sum(parts.values())
    return Counted(Flops(forward, step), parts, text_pass)


def gflops(flops: int) -> float:
    """Of a sample."""
    return flops / BATCH / 1e9


def print_parts(length: int) -> None:
    both = [count(enhanced, length) for enhanced in (True, False)]
    print(f"GFLOPs a sample, texts of {length} tokens{'with ET':>21} {'without':>10}")
    for part in both[0].parts:
        print(f"  {PARTS.get(part, part):43} {both[0].parts[part]:10.2f} {both[1].parts[part]:10.2f}")
    for what, flops in (("forward", 0), ("forward and backward", 1)):
        print(f"  {what:43} {both[0].all[flops]:10.2f} {both[1].all[flops]:10.2f}")


def print_ratios(lengths: list[int]) -> None:
    paper = f"{PAPER[True]:.1f} / {PAPER[False]:.1f} = {PAPER[True] / PAPER[False]:.3f}"
    print(f"\nwith ET / without (paper, what it counts is not said: {paper})")
    print(f"{'tokens':>6}  {'counted':47} {'GFLOPs':>22} {'GMACs':>17} {'ratio':>7}")
    for length in lengths:
        on, off = count(True, length), count(False, length)
        once = on.parts["vision"] / 2  # of the image tower's two forwards
        image_pass = Flops(once, once)
        rows = {
            "": (on.all, off.all),
            ", masked images' pass left out": (on.all.less(image_pass), off.all.less(image_pass)),
            ", MLM alone on fgd's masked texts": (on.all, off.all.less(off.text_pass)),
        }
        if length == lengths[0]:
            rest = tuple(name for name in EQ_8 if name != "fgd")
            rows[", no fgd"] = (count(True, length, rest).all, count(False, length, rest).all)
        for what, (enhanced, alone) in rows.items():
            for name, a, b in zip(("forward", "step"), enhanced, alone, strict=True):
                macs = f"{a / 2:7.1f} / {b / 2:7.1f}"
                print(f"{length:6}  {name + what:47} {a:10.1f} / {b:9.1f} {macs} {a / b:7.4f}")


def demo_batches(method: Method, number: int) -> list[Batch]:
    """Random tokens and texts; the masked view has [MASK] (id 4) at 15 % of a text's inner tokens."""
    generator = torch.Generator().manual_seed(0)
    vision: Any = method.vision
    made = []
    for draw in range(number):
        shortest, longest = DEMO_LENGTHS
        lengths = torch.randint(shortest, longest + 1, (DEMO_BATCH, 1), generator=generator)
        place = torch.arange(int(lengths.max()))
        ids = torch.randint(5, DEMO_VOCABULARY, (DEMO_BATCH, len(place)), generator=generator)
        inner = (place > 0) & (place < lengths - 1)
        scores = torch.rand(ids.shape, generator=generator).masked_fill(~inner, 2.0)
        rank = scores.argsort(dim=1).argsort(dim=1)
        masked = rank < (0.15 * (lengths - 2)).round().clamp(min=1)
        mask = (place < lengths).long()
        made.append(
            Batch(
                {},
                {"text": Texts(ids, mask), "text_masked": Texts(ids.masked_fill(masked, 4), mask)},
                [str(row) for row in range(DEMO_BATCH)],
                tokens={"image": torch.randn(DEMO_BATCH, vision.tokens, vision.width, generator=generator)},
                ids=torch.arange(DEMO_BATCH) + DEMO_BATCH * draw,
                draw=draw,
            )
        )
    return made


def print_times(rounds: int) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    both = {enhanced: build(DEMO, enhanced, EQ_8, DEMO_VOCABULARY).train() for enhanced in (True, False)}
    both[False].load_state_dict(both[True].state_dict())
    optimizers = {
        enhanced: torch.optim.AdamW([p for p in method.parameters() if p.requires_grad], lr=1e-4)
        for enhanced, method in both.items()
    }
    clocks = {"wall": time.perf_counter, "CPU": time.process_time}
    seconds: dict[tuple[str, bool], list[float]] = {(name, way): [] for name in clocks for way in both}
    for turn, batch in enumerate(demo_batches(both[True], rounds + WARM_UP)):
        for enhanced in (True, False) if turn % 2 else (False, True):
            begun = {name: clock() for name, clock in clocks.items()}
            optimizers[enhanced].zero_grad()
            torch.stack(list(both[enhanced](batch).losses.values())).sum().backward()
            optimizers[enhanced].step()
            both[enhanced].after_step()
            if turn >= WARM_UP:
                for name, clock in clocks.items():
                    seconds[name, enhanced].append(clock() - begun[name])
    paper = PAPER_STEPS_PER_S[False] / PAPER_STEPS_PER_S[True]
    print(f"\nstep at the demo's size, batch {DEMO_BATCH}, {rounds} pairs (paper's ratio: {paper:.3f})")
    for name in clocks:
        with_et, without = seconds[name, True], seconds[name, False]
        ratios = [a / b for a, b in zip(with_et, without, strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        print(
            f"  {name:4} s: with ET {statistics.median(with_et):.2f}, "
            f"without {statistics.median(without):.2f}; ratio {middle:.3f} (quartiles {low:.3f}-{high:.3f})"
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--lengths", type=int, nargs="*", default=[64, 32, 128], help="tokens of a text; none: no FLOPs"
    )
    parser.add_argument("--rounds", type=int, default=20, help="pairs of timed steps; 0: none")
    options = parser.parse_args()
    if options.lengths:
        print_parts(options.lengths[0])
        print_ratios(options.lengths)
    if options.rounds:
        print_times(options.rounds)


if __name__ == "__main__":
    main()
