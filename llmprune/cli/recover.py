"""Train a sparse checkpoint so that its zeros stay zeros, on text or towards the dense model's answers.

example: llmprune recover OUT -o RECOVERED --data c4 --distill HuggingFaceTB/SmolLM2-135M-Instruct
"""

from __future__ import annotations

import argparse

from llmprune.cli.options import add_json, add_run, add_trust, log, print_json


def configure(parser: argparse.ArgumentParser) -> None:
    """The arguments."""
    parser.add_argument("pruned", help="a folder written by llmprune, or any other checkpoint")
    parser.add_argument("-o", "--out", required=True, help="the folder to write")
    text = "what is trained on: c4, wikitext2, ptb, builtin, owner/name on the Hub, or a local file"
    parser.add_argument("--data", required=True, metavar="TEXT", help=text)
    add = parser.add_argument_group("training").add_argument
    add(
        "--method",
        metavar="NAME",
        help="full (all kept weights), lora (adapters within the masks, merged), norms (norms and biases) [full]",
    )
    add("--embeddings", action="store_true", default=None, help="with full: the embeddings and the output layer too")
    add("--steps", type=int, metavar="N", help="steps of the optimiser [500]")
    add("--rate", type=float, metavar="LR", help="the learning rate at its peak [2e-4, lora and norms 1e-3]")
    add("--weight-decay", type=float, metavar="W", help="of AdamW [0]")
    add("--batch", type=int, metavar="N", help="sequences at once on each GPU [4]")
    add("--accumulate", type=int, metavar="N", help="batches that make a step [1]")
    add("--length", type=int, metavar="N", help="tokens of a sequence [512, or what the model can take]")
    add("--samples", type=int, metavar="N", help="sequences to train on [as many as the steps take]")
    add("--held-out", type=int, metavar="N", help="sequences to measure on, before and after [16]")
    add("--seed", type=int, metavar="N", help="draws the text and its order [0]")
    add("--rank", type=int, metavar="R", help="of the adapters [16]")
    add("--alpha", type=float, metavar="A", help="adapters count A / rank [twice the rank]")
    add("--device", metavar="NAME", help="cpu or cuda [a GPU where there is one; all of them under torchrun]")
    compute = "compute in float32, bfloat16 or float16; weights stay float32 [bfloat16 on a GPU that has it]"
    add("--dtype", metavar="NAME", help=compute)
    add(
        "--checkpointing",
        action="store_true",
        default=None,
        help="compute blocks once more on the way back: less memory, a third more time",
    )
    add("--save-every", type=int, metavar="N", help="steps between points to go on from; 0 for none [200]")
    add = parser.add_argument_group("distillation").add_argument
    add("--distill", metavar="DENSE", help="the dense model, whose answers are the aim instead of the text itself")
    add("--lm-weight", type=float, metavar="W", help="what the loss on the text counts [1, with --distill 0]")
    add("--kl-weight", type=float, metavar="W", help="what KL(dense || sparse) counts [1]")
    add("--temperature", type=float, metavar="T", help="of that [1]")
    add("--hidden-weight", type=float, metavar="W", help="what the distance of hidden states counts [0]")
    add_trust(parser.add_argument)
    add_json(parser)
    add_run(parser)


OPTIONS = (
    "method", "embeddings", "steps", "rate", "weight_decay", "batch", "accumulate", "length", "samples", "held_out",
    "seed", "rank", "alpha", "device", "dtype", "checkpointing", "save_every", "lm_weight", "kl_weight", "temperature",
    "hidden_weight", "trust_remote_code",
)  # fmt: skip


def run(chosen: argparse.Namespace) -> int:
    """Recover."""
    from llmprune import distributed
    from llmprune.recover import recover

    options = {name: getattr(chosen, name) for name in OPTIONS}
    with distributed.joined():
        found = recover(
            chosen.pruned,
            out=chosen.out,
            data=chosen.data,
            distill=chosen.distill,
            restart=chosen.restart,
            progress=log(chosen),
            **options,
        )
        if distributed.is_first() and chosen.json:
            print_json(found.to_dict())
        elif distributed.is_first():
            show(found)
    return 0


def show(found: object) -> None:
    """Print the result for people."""
    from rich.console import Console

    from llmprune.recover import Recovered
    from llmprune.report.tables import recovery_table

    assert isinstance(found, Recovered)
    Console().print(recovery_table(found.out, found.record))
