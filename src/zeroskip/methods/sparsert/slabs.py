"""x in slabs of input channels, brought to shared memory by the copy engine while the code before them runs.

One warp of a block asks for slabs, the others compute.  Three barriers for each stage of shared memory, in this order:

    full    the slab is there: counts its bytes
    read    it was read here: counts the warps that compute
    clear   it was read everywhere: counts the mates (only if there are)

Mates are blocks of a cluster with the same pixels and other rows.  Each asks for its part of the channels of every
slab, which the engine writes to all of them, so that x leaves L2 once for the cluster.  A stage is asked for anew when
all mates are done with it; bytes that come before a block has said how many it expects are counted all the same.

In memory a slab is: image of the tile, channel, pixel of the image; or, of a tile within one image, channel, pixel.
Nobody has to wait at the end: whatever comes to a block, or arrives at its barriers, is waited for there.
"""

from __future__ import annotations

from dataclasses import dataclass

from zeroskip.core.layer import PRECISION_BYTES, Layer
from zeroskip.methods.sparsert.config import BARRIER, SparseRTConfig
from zeroskip.methods.sparsert.ptx import Body

COPY = "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes"
WAIT = "mbarrier.try_wait.parity.acquire"


@dataclass(frozen=True)
class Slabs:
    """Sizes, in bytes but for counts: of an element, between channels and between images of a slab, of a slab."""

    config: SparseRTConfig
    item: int
    images: int
    pitch: int
    image: int
    size: int
    count: int

    @staticmethod
    def of(layer: Layer, config: SparseRTConfig) -> Slabs:
        shape, span, item = layer.shape, config.span(layer.shape), PRECISION_BYTES[layer.precision]
        plane = shape.p * shape.q
        images = max(1, span // plane)
        pitch = span // images * item
        return Slabs(
            config, item, images, pitch, config.slab * pitch, images * config.slab * pitch, shape.c // config.slab
        )

    def stage(self, slab: int) -> int:
        """Where a slab lies."""
        return self.config.control_bytes + slab % self.config.stages * self.size

    def barrier(self, kind: int, slab: int) -> int:
        """Where its barrier lies: 0 full, 1 read, 2 clear."""
        return BARRIER * (kind * self.config.stages + slab % self.config.stages)

    def parity(self, slab: int) -> int:
        """Of its turn at its stage."""
        return slab // self.config.stages % 2

    def again(self, slab: int) -> bool:
        """Whether another slab comes to its stage."""
        return slab + self.config.stages < self.count

    # -- the entry --------------------------------------------------------------------------------------
    def begin(self, body: Body, thread: str, base: str) -> None:
        """Make the barriers, before any warp goes its way."""
        config = self.config
        first = body.to("p", "setp.eq.u32", f"{thread}, 0")
        for kind, arrivals in enumerate((1, config.teams * config.warps, config.mates)):
            for stage in range(config.stages):
                body.put(f"@{first} mbarrier.init.shared.b64 [{base}+{self.barrier(kind, stage)}], {arrivals}")
        body.put("fence.mbarrier_init.release.cluster")
        if config.mates == 1:
            body.put("bar.sync 0")
        else:
            body.put("barrier.cluster.arrive.aligned")
            body.put("barrier.cluster.wait.aligned")

    # -- the warps that compute -------------------------------------------------------------------------
    def take(self, body: Body, base: str, slab: int) -> None:
        """Wait until a slab is there."""
        _wait(body, f"{base}+{self.barrier(0, slab)}", self.parity(slab), f"SLAB_{slab}")

    def leave(self, body: Body, base: str, slab: int, first: str) -> None:
        """All loads of a slab were made, by the whole warp; ``first``: predicate of one of its lanes."""
        if self.again(slab):
            body.put("bar.warp.sync 0xFFFFFFFF")
            body.put(f"@{first} mbarrier.arrive.shared::cta.b64 _, [{base}+{self.barrier(1, slab)}]")

    # -- the warp that asks -----------------------------------------------------------------------------
    def bring(self, body: Body, layer: Layer, x: str, x_image: str, tile: str, rank: str, lane: str) -> None:
        """Ask for every slab.  ``rank``: of the block among its mates; the other registers as in ``function.py``."""
        config, shape = self.config, layer.shape
        plane = shape.p * shape.q * self.item
        base = body.to("r", "mov.u32", "sums")
        first = body.to("p", "setp.eq.u32", f"{lane}, 0")
        if shape.p * shape.q > config.span(shape):
            strips = shape.p * shape.q // config.span(shape)
            image, strip = body.divided(tile, strips)
            x = body.to("d", "mad.wide.s32", f"{strip}, {self.pitch}, {x}")
            if x_image:
                x = body.to("d", "mad.wide.s32", f"{image}, {x_image}, {x}")
        elif x_image:
            image = body.to("r", "mul.lo.u32", f"{tile}, {self.images}")
            x = body.to("d", "mad.wide.s32", f"{image}, {x_image}, {x}")
        share = config.slab // config.mates
        to, away = base, x
        if config.mates > 1:
            to = body.to("r", "mad.lo.u32", f"{rank}, {share * self.pitch}, {base}")
            away = body.to("d", "mad.wide.s32", f"{rank}, {share * plane}, {x}")
        clears = [
            body.to("r", "mapa.shared::cluster.u32", f"{base}, {mate}")
            for mate in range(config.mates)
            if config.mates > 1
        ]
        for slab in range(self.count):
            full = f"[{base}+{self.barrier(0, slab)}]"
            if slab >= config.stages:
                before = slab - config.stages
                _wait(body, f"{base}+{self.barrier(1, before)}", self.parity(before), f"READ_{slab}")
                for clear in clears:
                    body.put(
                        f"@{first} mbarrier.arrive.release.cluster.shared::cluster.b64 _, "
                        f"[{clear}+{self.barrier(2, before)}]"
                    )
                if clears:
                    where = f"{base}+{self.barrier(2, before)}"
                    _wait(body, where, self.parity(before), f"CLEAR_{slab}", scope="cluster")
            body.put(f"@{first} mbarrier.arrive.expect_tx.shared::cta.b64 _, {full}, {self.size}")
            offset = slab * config.slab * plane
            if plane == self.pitch:
                self._images(body, first, to, away, x_image, full, self.stage(slab), offset, share * plane)
            else:
                self._channels(body, lane, to, away, full, self.stage(slab), offset, plane, share)

    def _images(
        self, body: Body, first: str, to: str, x: str, x_image: str, full: str, stage: int, offset: int, size: int
    ) -> None:
        """A slab's channels of an image are one run of memory."""
        for image in range(self.images):
            source = body.to("d", "mad.wide.s32", f"{x_image}, {image}, {x}") if image else x
            self._copy(body, first, f"{to}+{stage + image * self.image}", f"{source}+{offset}", size, full)

    def _channels(
        self, body: Body, lane: str, to: str, x: str, full: str, stage: int, offset: int, plane: int, share: int
    ) -> None:
        """Of a strip of pixels every channel is a run; each lane asks for some."""
        to, x = (
            body.to("r", "mad.lo.u32", f"{lane}, {self.pitch}, {to}"),
            body.to("d", "mad.wide.s32", f"{lane}, {plane}, {x}"),
        )
        for channel in range(0, share, 32):
            some = body.to("p", "setp.lt.u32", f"{lane}, {share - channel}")
            here = f"{to}+{stage + channel * self.pitch}"
            self._copy(body, some, here, f"{x}+{offset + channel * plane}", self.pitch, full)

    def _copy(self, body: Body, guard: str, to: str, source: str, size: int, full: str) -> None:
        if self.config.mates == 1:
            body.put(f"@{guard} {COPY} [{to}], [{source}], {size}, {full}")
        else:
            mates = body.to("h", "mov.b16", str((1 << self.config.mates) - 1))
            body.put(f"@{guard} {COPY}.multicast::cluster [{to}], [{source}], {size}, {full}, {mates}")


def _wait(body: Body, barrier: str, parity: int, label: str, scope: str = "cta") -> None:
    """Until a turn of a barrier is over."""
    body.label(label)
    over = body.to("p", f"{WAIT}.{scope}.shared::cta.b64", f"[{barrier}], {parity}")
    body.put(f"@{over} bra {label}_OVER")
    body.put(f"bra {label}")
    body.label(f"{label}_OVER")
