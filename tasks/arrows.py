"""ArrowPath: follow arrows through a grid. After one slip, everything stands in the wrong cell."""

import functools
from dataclasses import dataclass, field

from tasks.base import Task
from tasks.pictures import arrows_picture

# Where an arrow leads: (columns, rows), with row 1 at the top.
DIRECTIONS = {"R": (1, 0), "D": (0, 1), "L": (-1, 0), "U": (0, -1)}
MAX_WALKS = 8  # attempts at a walk that is long enough


@dataclass(frozen=True)
class ArrowPath(Task):
    """A grid of arrows: from the golden cell follow `length` of them; one slip ruins the rest.

    A cell is a column letter and a row digit, A1 at the top left. A move is the arrow read and the
    cell reached, "RC2". The content is ((start,), {cell: arrow}).
    """

    length: int = 8
    grid: int = 4
    verbosity: int = field(default=0, repr=False)  # not in the repr: the examples stay the same
    habits: float = field(default=0.0, repr=False)  # nor this: only the demonstrations change
    ranges = {"length": (1, 256), "grid": (2, 9), "verbosity": (0, 200)}
    read_size = 2

    @property
    def move_count(self):
        return self.length

    @property
    def side(self):
        return self.grid

    @functools.cached_property
    def roads(self):
        """{cell: {arrow: the cell it leads to}}, without the arrows that would leave the grid."""
        names = {}
        for row in range(self.grid):
            for column in range(self.grid):
                names[column, row] = f"{chr(ord('A') + column)}{row + 1}"
        roads = {}
        for (column, row), cell in names.items():
            roads[cell] = {}
            for arrow, (columns, rows) in DIRECTIONS.items():
                target = names.get((column + columns, row + rows))
                if target is not None:
                    roads[cell][arrow] = target
        return roads

    def _draw(self, rng):
        # Random arrows alone soon end in a ping-pong between two cells, so a walk through fresh
        # cells is laid over them. The other arrows stay random, or a glance at the field would give
        # the path away.
        arrows = {}
        for cell, targets in self.roads.items():
            arrows[cell] = list(targets)[int(rng.random() * len(targets))]
        walk, last_cell = self._fresh_walk(rng)
        if len(walk) < self.length:
            walk[last_cell] = self._way_back(walk, last_cell)
        start = next(iter(walk))
        return (start,), arrows | walk

    def _fresh_walk(self, rng):
        """A random walk that enters no cell twice: `({cell: arrow taken}, the cell it ends in)`.

        It has `length` moves, or as many as the grid has room for. A walk that runs into a dead end
        before is begun anew; if the last attempt is one, its walk is the shorter.
        """
        wanted = min(self.length, self.grid**2 - 1)
        cells = list(self.roads)
        for _ in range(MAX_WALKS):
            walk = {}
            cell = cells[rng.integers(len(cells))]
            while len(walk) < wanted:
                targets = self.roads[cell]
                fresh = [arrow for arrow, target in targets.items() if target not in walk]
                if not fresh:
                    break
                walk[cell] = fresh[int(rng.random() * len(fresh))]
                cell = targets[walk[cell]]
            if len(walk) == wanted:
                break
        return walk, cell

    def _way_back(self, walk, cell):
        """The arrow from a walk's end to where it came by earliest: it closes the longest loop.

        All cells around the end lie on the walk, or it would have gone on.
        """
        places = {passed: place for place, passed in enumerate(walk)}
        targets = self.roads[cell]
        return min(targets, key=lambda arrow: places[targets[arrow]])

    def _present(self, content, rng):
        (start,), arrows = content
        picture = arrows_picture(arrows, start, self.grid, rng)
        return picture, f"Follow {self.length} arrows."

    def _move(self, content, known, i, result):
        if result not in self.roads:  # any string may stand where the start should be read
            return None
        _, arrows = content
        arrow = arrows[result]
        return arrow + self.roads[result][arrow]

    def _slips(self, right, result):
        # A move slips into another arrow of the same cell, followed well; a read and the answer
        # slip into another cell.
        moves = [arrow + target for arrow, target in self.roads.get(result, {}).items()]
        choices = moves if right in moves else list(self.roads)
        return [choice for choice in choices if choice != right]

    def _habit(self, right, result):
        """Takes an arrow up for an arrow down, where there is a cell below."""
        below = self.roads.get(result, {}).get("D")
        is_upward_move = right.startswith("U")
        return "D" + below if is_upward_move and below else None
