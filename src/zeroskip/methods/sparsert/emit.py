"""A packed layer -> the PTX text of its kernel.

    y[row, pixel] = act(bias[row] + sum over columns of W[row, column] * x[column, pixel])

Every team of a block (``config.py``) has a function of its own (``function.py``): one load of x for each column with a
nonzero among its rows, one multiply-add with the weight as an immediate for each nonzero.  The entry finds the team's
function by block and warp.  Functions do not return, so they save no registers; ptxas takes a third less time for them
than for one kernel with as many labels, and each is scheduled for itself.

Where teams share a row group, each finishes some of its rows: the others store their sums in its block's shared
memory, and they are added in the order of the teams (``exchange.py``).  x may come in slabs, for which one more warp of
the block asks (``slabs.py``).

Grid: tiles of pixels (or the blocks that walk them), blocks of rows (of all mates), blocks of the cluster.  Arguments:
``x``, ``y``, ``residual``, then strides in bytes: of images of x; of images, channels and rows of y; of images of the
residual.  No function has more than the twelve registers of arguments that are passed without a stack.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby

import numpy as np

from zeroskip.core.device import generation
from zeroskip.core.errors import Unsupported
from zeroskip.cuda.limits import CLUSTERS
from zeroskip.methods.sparsert.config import BARRIER, SparseRTPacked
from zeroskip.methods.sparsert.function import POINTERS, STRIDES, function, parameters
from zeroskip.methods.sparsert.ptx import BITS, Body, half_pairs, singles
from zeroskip.methods.sparsert.slabs import Slabs
from zeroskip.methods.sparsert.team import Team

SYMBOL = "sparsert"
OLDEST = 80
"""The first generation that the text is written for."""


def emit(packed: SparseRTPacked, arch: str) -> str:
    """PTX for GPUs of ``arch`` ("sm_80", "sm_90a", ...).  Depends on nothing but its arguments.

    Raises:
        Unsupported: the configuration needs clusters or the copy engine, which ``arch`` has not.
    """
    config, hopper = packed.config, generation(arch) >= CLUSTERS
    if (config.split > 1 or config.slab) and not hopper:
        raise Unsupported(f"{arch} has no clusters and no copy engine: {config}")
    if config.mates > 1 and arch[-1] not in "af":
        raise Unsupported(f"{arch} copies to several blocks slowly, {arch}a would not: {config}")
    functions = [function(packed, team, hopper) for team in _teams(packed)]
    head = [
        ".version 8.6" if generation(arch) > CLUSTERS and config.mates > 1 else ".version 8.1",
        f".target {arch}" if config.mates > 1 else f".target sm_{CLUSTERS if hopper else OLDEST}",
        ".address_size 64",
        *([".extern .shared .align 16 .b8 sums[];"] if config.parts > 1 or config.slab else []),
    ]
    return "\n".join([*head, *functions, _entry(packed, len(functions), hopper), ""])


def _teams(packed: SparseRTPacked) -> Iterator[Team]:
    """In the order of row blocks, blocks of the cluster, row groups of the block, thread groups."""
    config, weight = packed.config, packed.weight
    groups, bounds = weight.rows.cpu().tolist(), weight.bounds.cpu().tolist()
    places, columns = weight.places.cpu().numpy(), weight.columns.cpu().tolist()
    values = weight.values.cpu().float().numpy()
    operands = half_pairs(values.astype(np.float16)) if config.terms else singles(values)
    entries = list(zip(columns, places.tolist(), operands, strict=True))
    biases = packed.bias.cpu().tolist()
    index = 0
    for block in range(len(groups) // config.stack):
        for rank in range(config.split):
            for row_group in range(block * config.stack, (block + 1) * config.stack):
                rows = [row for row in groups[row_group] if row >= 0]
                ends = bounds[row_group * config.parts : (row_group + 1) * config.parts + 1]
                given = np.zeros((config.parts, len(rows)), np.bool_)
                for part in range(config.parts):
                    given[part, places[ends[part] : ends[part + 1]]] = True
                for part in range(rank * config.groups, (rank + 1) * config.groups):
                    own = groupby(entries[ends[part] : ends[part + 1]], key=lambda entry: entry[0])
                    nonzeros = [(column, [entry[1:] for entry in found]) for column, found in own]
                    yield Team(index, part, rows, [biases[row] for row in rows], nonzeros, given)
                    index += 1


def _entry(packed: SparseRTPacked, functions: int, hopper: bool) -> str:
    config, body = packed.config, Body()
    if hopper:
        body.put("griddepcontrol.launch_dependents")
    arguments = [(BITS[kind], body.to(kind, f"ld.param{BITS[kind]}", f"[{name}]")) for kind, name in parameters(packed)]
    thread, index = body.to("r", "mov.u32", "%tid.x"), body.to("r", "mov.u32", "%ctaid.y")
    if config.split > 1:
        # Before anybody's sums come, every block of the cluster has begun and its barriers are ready.
        base = body.to("r", "mov.u32", "sums")
        barrier = body.to("r", "mad.lo.u32", f"{thread}, {BARRIER}, {base}")
        one = body.to("p", "setp.lt.u32", f"{thread}, {config.teams}")
        body.put(f"@{one} mbarrier.init.shared.b64 [{barrier}], 1")
        body.meet_cluster()
    if config.slab:
        slabs, base = Slabs.of(packed.layer, config), body.to("r", "mov.u32", "sums")
        slabs.begin(body, thread, base)
    if config.cluster > 1:
        rank = body.to("r", "mov.u32", "%ctaid.z")
        index = body.to("r", "mad.lo.u32", f"{index}, {config.cluster}, {rank}")
    if config.slab:
        asks = body.to("p", "setp.ge.u32", f"{thread}, {config.lanes * config.teams}")
        body.put(f"@{asks} bra ASK")
    if config.teams > 1:
        index = body.to("r", "mad.lo.u32", f"{index}, {config.teams}, {body.quotient(thread, config.lanes)}")
    body.enter(index, functions, arguments)
    if config.slab:
        body.label("ASK")
        body.put("griddepcontrol.wait")
        known = {name: register for (_, name), (_, register) in zip(parameters(packed), arguments, strict=True)}
        x = body.to("d", "cvta.to.global.u64", known["x"])
        tile = body.to("r", "mov.u32", "%ctaid.x")
        lane = body.to("r", "and.b32", f"{thread}, 31")
        slabs.bring(body, x, known.get("x_image", ""), tile, rank if config.mates > 1 else "0", lane)
        body.put("exit")
    types = [f".param .u64 {name}" for name in POINTERS] + [f".param .u32 {name}" for name in STRIDES]
    return "\n".join(
        [
            f".visible .entry {SYMBOL}({', '.join(types)})",
            f".reqntid {config.threads}",
            f".maxnreg {config.registers}",
            # Of a size that the launch says: ptxas need not write code for blocks without a cluster.
            *([".explicitcluster"] if config.cluster > 1 else []),
            "{",
            body.text(),
            "}",
        ]
    )
