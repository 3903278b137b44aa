"""What there is to decide in a function: its layers in groups, and the candidates worth a try."""

from __future__ import annotations

import collections
import dataclasses

from jaxsparse.tuning.choice import Question
from jaxsparse.tuning.key import Choice, Key, row_bucket
from jaxsparse.tuning.record import Layer, Recorded

WITHIN = 1.6  # candidates predicted to take more than this times the best are not tried
MOST_TRIED = 7


@dataclasses.dataclass
class Task:
    """A decision that belongs to one layer, or to several equal ones; `which` is the number of their map."""

    question: Question
    layer: Layer
    which: int
    neighbours: float
    sort: Question | None  # whether its rows are sorted, where the group decides that
    count: int = 0

    @property
    def weight(self) -> float:
        """Predicted time of all its products in microseconds."""
        return self.count * self.question.predict(self.question.heuristic(), self.neighbours)


@dataclasses.dataclass
class Work:
    """A group: maps, layers with their counts by map, the decisions of layers and those that they share."""

    name: str
    layers: dict[int, collections.Counter[Layer]]
    tasks: dict[Key, Task]
    shared: dict[Key, tuple[Question, float]]  # with neighbours

    @property
    def heuristic(self) -> dict[Key, Choice]:
        """What runs without a result, by key."""
        questions = [t.question for t in self.tasks.values()] + [q for q, _ in self.shared.values()]
        return {q.key: q.heuristic() for q in questions}


def divide(recorded: Recorded, platform: str, mode: str) -> list[Work]:
    """The groups of a function, that with the longest predicted time first."""
    products = [layer for layers in recorded.layers for layer in layers]
    add_gradients = mode == "training" and not any(layer.op == "wgrad" for layer in products)
    works: dict[tuple, Work] = {}
    for which, layers in enumerate(recorded.layers):
        if add_gradients:
            grown: collections.Counter[Layer] = collections.Counter()
            for layer, count in layers.items():
                for product in layer.with_gradients():
                    grown[product] += count
            layers = grown
        spec = next(iter(layers)).spec
        name = f"grid {'x'.join(map(str, spec.grid))}, {spec.in_rows:,} rows"
        work = works.setdefault((spec.grid, row_bucket(spec.in_rows)), Work(name, {}, {}, {}))
        work.layers[which] = layers
        build = recorded.builds[which]
        question = build.question(platform) if build is not None else None
        if question is not None:
            work.shared.setdefault(question.key, (question, 0.0))
        neighbours: dict[bool, float] = {}
        for layer, count in layers.items():
            of_reverse = layer.problem.of_reverse
            if of_reverse not in neighbours:
                neighbours[of_reverse] = recorded.neighbours(which, of_reverse)
            questions = layer.questions(platform)
            sort, sort_is_given = questions.get("sort", (None, None))
            for role, (question, explicit) in questions.items():
                if explicit is not None or len(question.candidates) == 1:
                    continue
                if role == "own":
                    undecided = None if sort_is_given is not None else sort
                    task = Task(question, layer, which, neighbours[of_reverse], undecided)
                    work.tasks.setdefault(question.key, task).count += count
                else:
                    work.shared.setdefault(question.key, (question, neighbours[of_reverse]))
    return sorted(works.values(), key=lambda work: -sum(task.weight for task in work.tasks.values()))


def pruned(question: Question, neighbours: float | None) -> list[Choice]:
    """The candidates worth timing by the cost model, the most promising first; the heuristic's choice is among them."""
    predicted = {c: question.predict(c, neighbours) for c in question.candidates}
    limit = WITHIN * min(predicted.values())
    near = sorted((c for c in predicted if predicted[c] <= limit), key=predicted.__getitem__)[:MOST_TRIED]
    known = question.heuristic()
    return near if known in near else [*near, known]


def other_orders(task: Task) -> list[tuple[Key, Choice]]:
    """Orders of rows besides the heuristic's that are worth a try with this task, as changed choices."""
    if task.sort is None:
        return []
    usual = task.sort.heuristic()
    return [(task.sort.key, v) for v in pruned(task.sort, task.neighbours) if v != usual]
