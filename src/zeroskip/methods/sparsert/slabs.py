"""x in slabs of input channels, brought to shared memory by the copy engine while the code before them runs.

One warp of a block asks for slabs, the others compute.  Three barriers for each stage of shared memory, in this order:

    full    the slab is there: counts its bytes
    read    it was read here: counts the warps that compute
    clear   it was read everywhere: counts the mates (only if there are)

Mates are blocks of a cluster with the same pixels and other rows.  Each asks for its part of the channels of every
slab, which the engine writes to all of them, so that x leaves L2 once for the cluster.  A stage is asked for anew when
all mates are done with it; bytes that come before a block has said how many it expects are counted all the same.

In memory a slab is: image of the tile, channel, pixel of the image; or, of a tile within one image, channel, pixel.
Where blocks walk, the slabs of the next tile follow those of the last in the same stages, whose barriers had an even
number of turns: what is asked for first waits for the last tile's, but for the first tile.  Nobody has to wait at the
end: whatever comes to a block is waited for there, and so is what arrives from its mates.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from zeroskip.core.layer import PRECISION_BYTES, Layer
from zeroskip.methods.sparsert.config import BARRIER, SparseRTConfig
from zeroskip.methods.sparsert.ptx import Body

FULL, READ, CLEAR = range(3)
COPY = "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes"


@dataclass(frozen=True)
class _Copy:
    """One of the copies that a slab takes: who asks for it; registers, and bytes behind them and behind where the slab
    begins; bytes."""

    guard: str
    to: str
    to_offset: int
    source: str
    source_offset: int
    size: int


@dataclass(frozen=True)
class Slabs:
    """Bytes of an element, between channels of x (``plane``) and of a slab (``pitch``); images of a tile; slabs of a
    tile; tiles."""

    config: SparseRTConfig
    item: int
    plane: int
    pitch: int
    images: int
    count: int
    tiles: int

    @staticmethod
    def of(layer: Layer, config: SparseRTConfig) -> Slabs:
        shape, span, item = layer.shape, config.span(layer.shape), PRECISION_BYTES[layer.precision]
        plane = shape.p * shape.q
        images = max(1, span // plane)
        count, tiles = shape.c // config.slab, config.tiles(shape)
        return Slabs(config, item, plane * item, span // images * item, images, count, tiles)

    @property
    def image(self) -> int:
        """Bytes of a slab that belong to one image."""
        return self.config.slab * self.pitch

    @property
    def size(self) -> int:
        """Bytes of a slab."""
        return self.images * self.image

    def stage(self, slab: int) -> int:
        """Where a slab lies."""
        return self.config.control_bytes + slab % self.config.stages * self.size

    def barrier(self, base: str, kind: int, slab: int) -> str:
        """The address of its barrier."""
        return f"{base}+{BARRIER * (kind * self.config.stages + slab % self.config.stages)}"

    def parity(self, slab: int) -> int:
        """Of its turn at its stage."""
        return slab // self.config.stages % 2

    # -- the entry --------------------------------------------------------------------------------------
    def begin(self, body: Body, thread: str, base: str) -> None:
        """Make the barriers, before any warp goes its way."""
        config = self.config
        first = body.to("p", "setp.eq.u32", f"{thread}, 0")
        for kind, arrivals in ((FULL, 1), (READ, config.teams * config.warps), (CLEAR, config.mates)):
            for stage in range(config.stages):
                body.put(f"@{first} mbarrier.init.shared.b64 [{self.barrier(base, kind, stage)}], {arrivals}")
        if config.mates > 1:
            body.meet_cluster()
        else:
            body.put("fence.mbarrier_init.release.cluster")
            body.put("bar.sync 0")

    # -- the warps that compute -------------------------------------------------------------------------
    def place(self, body: Body, base: str, pixel: str) -> str:
        """The address of a pixel of the tile, but for stage and channel."""
        if self.images > 1:
            image, pixel = body.divided(pixel, self.pitch // self.item)
            base = body.to("r", "mad.lo.u32", f"{image}, {self.image}, {base}")
        return body.to("r", "mad.lo.u32", f"{pixel}, {self.item}, {base}")

    def take(self, body: Body, base: str, slab: int) -> None:
        """Wait until a slab is there."""
        label = f"SLAB_{slab}"
        body.wait(self.barrier(base, FULL, slab), self.parity(slab), label, f"{label}_OVER", "cta")

    def leave(self, body: Body, base: str, slab: int, first: str) -> None:
        """All loads of a slab were made, by the whole warp; ``first``: predicate of one of its lanes."""
        if self.config.walk or slab + self.config.stages < self.count:  # another comes to its stage
            body.put("bar.warp.sync 0xFFFFFFFF")
            body.put(f"@{first} mbarrier.arrive.shared::cta.b64 _, [{self.barrier(base, READ, slab)}]")

    # -- the warp that asks -----------------------------------------------------------------------------
    def bring(self, body: Body, x: str, x_image: str, tile: str, rank: str, lane: str) -> None:
        """Ask for every slab.  ``rank``: of the block among its mates; the other registers as in ``function.py``."""
        config, fresh = self.config, ""
        base = body.to("r", "mov.u32", "sums")
        first = body.to("p", "setp.eq.u32", f"{lane}, 0")
        if config.walk:
            body.label("ASK_NEXT")
            fresh = body.to("p", "setp.eq.u32", f"{tile}, {body.to('r', 'mov.u32', '%ctaid.x')}")
        copies = list(self._copies(body, base, x, x_image, tile, rank, lane, first))
        how, mates, everywhere = COPY, "", list[str]()
        if config.mates > 1:
            how += ".multicast::cluster"
            mates = ", " + body.to("h", "mov.b16", str((1 << config.mates) - 1))
            everywhere = [body.to("r", "mapa.shared::cluster.u32", f"{base}, {mate}") for mate in range(config.mates)]
        for slab in range(self.count):
            if slab >= config.stages:
                self._again(body, base, everywhere, slab, first)
            elif config.walk:
                body.put(f"@{fresh} bra FRESH_{slab}")
                self._again(body, base, everywhere, slab, first)
                body.label(f"FRESH_{slab}")
            full = self.barrier(base, FULL, slab)
            body.put(f"@{first} mbarrier.arrive.expect_tx.shared::cta.b64 _, [{full}], {self.size}")
            for copy in copies:
                to = f"{copy.to}+{self.stage(slab) + copy.to_offset}"
                source = f"{copy.source}+{slab * config.slab * self.plane + copy.source_offset}"
                body.put(f"@{copy.guard} {how} [{to}], [{source}], {copy.size}, [{full}]{mates}")
        if config.walk:
            body.put(f"add.u32 {tile}, {tile}, {config.walk}")
            body.put(f"@{body.to('p', 'setp.lt.u32', f'{tile}, {self.tiles}')} bra ASK_NEXT")

    def _again(self, body: Body, base: str, everywhere: list[str], slab: int, first: str) -> None:
        """Wait until what was in the stage of a slab was read, here and by the mates: of this tile or the last."""
        before = slab - self.config.stages
        body.wait(self.barrier(base, READ, before), self.parity(before), f"READ_{slab}", f"READ_{slab}_OVER", "cta")
        for mate in everywhere:
            clear = self.barrier(mate, CLEAR, before)
            body.put(f"@{first} mbarrier.arrive.release.cluster.shared::cluster.b64 _, [{clear}]")
        if everywhere:
            clear, label = self.barrier(base, CLEAR, before), f"CLEAR_{slab}"
            body.wait(clear, self.parity(before), label, f"{label}_OVER", "cluster")

    def _copies(
        self, body: Body, base: str, x: str, x_image: str, tile: str, rank: str, lane: str, first: str
    ) -> Iterator[_Copy]:
        """Those of this block, which has its share of the channels of every slab."""
        share, strips = self.config.slab // self.config.mates, self.plane // self.pitch
        image = tile
        if strips > 1:
            image, strip = body.divided(tile, strips)
            x = body.to("d", "mad.wide.s32", f"{strip}, {self.pitch}, {x}")
        elif x_image:
            image = body.to("r", "mul.lo.u32", f"{tile}, {self.images}")
        if x_image:
            x = body.to("d", "mad.wide.s32", f"{image}, {x_image}, {x}")
        to = base
        if self.config.mates > 1:
            to = body.to("r", "mad.lo.u32", f"{rank}, {share * self.pitch}, {base}")
            x = body.to("d", "mad.wide.s32", f"{rank}, {share * self.plane}, {x}")
        if strips == 1:
            # The channels of an image are one run of memory.
            for index in range(self.images):
                source = body.to("d", "mad.wide.s32", f"{x_image}, {index}, {x}") if index else x
                yield _Copy(first, to, index * self.image, source, 0, share * self.plane)
            return
        # Of a strip of pixels every channel is a run; each lane asks for some.
        to = body.to("r", "mad.lo.u32", f"{lane}, {self.pitch}, {to}")
        x = body.to("d", "mad.wide.s32", f"{lane}, {self.plane}, {x}")
        for channel in range(0, share, 32):
            some = body.to("p", "setp.lt.u32", f"{lane}, {share - channel}")
            yield _Copy(some, to, channel * self.pitch, x, channel * self.plane, self.pitch)
