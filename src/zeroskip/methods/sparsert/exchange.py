"""How sums get to the team that finishes their rows, where teams share a row group.

Within a block through shared memory and a barrier of the block.  In a cluster every store counts its bytes at a barrier
of the team it is for (``st.async``), so that nobody waits for more than its own and no memory is flushed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from zeroskip.methods.sparsert.config import BARRIER, FLOAT, SparseRTConfig
from zeroskip.methods.sparsert.ptx import Body, operand, width
from zeroskip.methods.sparsert.team import Team


@dataclass(frozen=True)
class Exchange:
    """Of one team.  ``lane``: the register of a thread's number in it; ``sums``: by place, the registers of a row's
    sums, those of other teams added by ``run``; ``hopper``: sm_90 or later."""

    body: Body
    config: SparseRTConfig
    team: Team
    lane: str
    sums: dict[int, list[str]]
    hopper: bool

    def run(self, own: Sequence[int]) -> None:
        """Bring the sums of every row to the team that finishes it."""
        config, body = self.config, self.body
        base = body.to("r", "mov.u32", "sums")
        lane = body.to("r", "mad.lo.u32", f"{self.lane}, {min(config.vector, 4) * FLOAT}, {base}")
        if config.split == 1:
            for place in self._foreign():
                for registers, offset in self._slots(place, self.team.part, self.sums[place]):
                    body.put(f"st.shared{width(len(registers))}.f32 [{lane}+{offset}], {operand(registers)}")
            self.meet()
        else:
            self._send(base, lane)
            self._await(base, own)
        for place in own:
            self._collect(place, lane)

    def meet(self) -> None:
        """All teams of the block, from code of their own, which the aligned form, ``bar.sync``, is not for.

        For sm_80 ptxas keeps what lives across the other form in memory; there the aligned one must do: the hardware
        counts warps, wherever they come from.
        """
        self.body.put("barrier.sync 0" if self.hopper else "bar.sync 0")

    def _foreign(self) -> list[int]:
        """Places whose sums another team finishes."""
        places = range(len(self.team.rows))
        return [place for place in places if self.team.owner(place) != self.team.part and place in self.sums]

    def _send(self, base: str, lane: str) -> None:
        config, body = self.config, self.body
        there: dict[int, tuple[str, str]] = {}
        for place in self._foreign():
            owner = self.team.owner(place)
            rank = owner // config.groups
            if rank not in there:
                mapped = [body.to("r", "mapa.shared::cluster.u32", f"{address}, {rank}") for address in (lane, base)]
                there[rank] = (mapped[0], mapped[1])
            to, barriers = there[rank]
            for registers, offset in self._slots(place, self.team.part, self.sums[place]):
                body.put(
                    f"st.async.shared::cluster.mbarrier::complete_tx::bytes{width(len(registers))}.f32 "
                    f"[{to}+{offset}], {operand(registers)}, [{barriers}+{BARRIER * self._seat(owner)}]"
                )

    def _await(self, base: str, own: Sequence[int]) -> None:
        """Until everything has come for the rows that this team finishes."""
        config, body, team = self.config, self.body, self.team
        coming = sum(int(team.given[:, place].sum()) - int(team.given[team.part, place]) for place in own)
        if not coming:
            return
        barrier = f"{base}+{BARRIER * self._seat(team.part)}"
        first = body.to("p", "setp.eq.u32", f"{self.lane}, 0")
        expected = coming * config.tile * FLOAT
        body.put(f"@{first} mbarrier.arrive.expect_tx.shared::cta.b64 _, [{barrier}], {expected}")
        body.wait(barrier, 0, "COMING", "HERE", "cluster")

    def _seat(self, part: int) -> int:
        """The number within its block of the team that computes a part of this row group."""
        stacked = self.team.index % self.config.teams // self.config.groups
        return stacked * self.config.groups + part % self.config.groups

    def _slots(self, place: int, source: int, registers: Sequence[str]) -> Iterator[tuple[Sequence[str], int]]:
        """Which ``registers`` of a part go where in the shared memory of the owner's block, in bytes from a lane's
        own."""
        config, owner = self.config, self.team.owner(place)
        row, slot = place - self.team.owned(owner)[0], source - (source > owner)
        line = (self._seat(owner) * config.chunk + row) * (config.parts - 1) + slot
        offset, wide = config.barrier_bytes + line * config.tile * FLOAT, min(config.vector, 4)
        for at in range(0, len(registers), wide):
            # A run of `wide` sums of every lane, then the next.
            yield registers[at : at + wide], offset + at * config.lanes * FLOAT

    def _collect(self, place: int, lane: str) -> None:
        body, config, team = self.body, self.config, self.team
        for source in range(config.parts):
            if source == team.part or not team.given[source, place]:
                continue
            part = [body.new("f") for _ in range(config.columns)]
            for registers, offset in self._slots(place, source, part):
                body.put(f"ld.shared{width(len(registers))}.f32 {operand(registers)}, [{lane}+{offset}]")
            self.sums[place] = self.body.plus(self.sums[place], part) if place in self.sums else part
