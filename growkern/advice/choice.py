"""Which recipe an advice assumes: the one that is asked for, the one of an event, or the best of the measured ones."""

from collections.abc import Mapping, Sequence
from statistics import mean

from growkern.depth import IdentityBlocks
from growkern.errors import PlanError
from growkern.recipes import RECIPES
from growkern.recipes.recipe import KINDS, Recipe
from growkern.support.text import short
from growkern.training.triggers import Event
from growkern.width import Lossless

SEEDS = 3  # minimum number of seeds of a saving that is compared
BEATS = 0.02  # least saved share of the compute by which a recipe beats another one: about the standard error of a saving in width
METHODS = {"width": Lossless(), "depth": IdentityBlocks()}  # default methods of expand_inplace


def choose(recipe: object, kind: object) -> Recipe:
    """Return the recipe of the arguments ``recipe`` and ``kind`` of ``advise``; either may be None.

    Raises:
        PlanError: Nothing is measured under the name, or a recipe of another kind.
    """
    if kind is not None and not (isinstance(kind, str) and kind in KINDS):
        raise PlanError(f"kind={short(kind)}: pass 'width', 'depth' or 'both'.")
    if recipe is None:
        return best(RECIPES, kind or "width")
    named = RECIPES.get(recipe) if isinstance(recipe, str) else recipe
    if isinstance(named, Recipe) and kind in (None, named.kind):
        return named
    if isinstance(recipe, Recipe):
        raise PlanError(
            f"recipe={recipe.name!r} grows {recipe.kind!r}, and kind={kind!r}: leave kind= out."
        )
    if not isinstance(recipe, str):
        raise PlanError(
            f"recipe={short(recipe)}: pass the name of a measured recipe, or a Recipe of your own measurements."
        )
    known = [f"{name} ({r.kind})" for name, r in RECIPES.items() if kind in (None, r.kind)]
    raise PlanError(
        f"no recipe {recipe!r}{f' of kind {kind!r}' if kind else ''} was measured. Known: {'; '.join(known) or 'none'}. Pass a Recipe of "
        "your own measurements."
    )


def best(recipes: Mapping[str, Recipe], kind: str) -> Recipe:
    """Return the recipe of a kind that the fewest other recipes beat; of equal ones, the recipe that was measured in more setups.

    A recipe beats another one if it saves at least ``BEATS`` more on average over the setups, growth points and budgets where both
    were measured with ``SEEDS`` seeds (with fewer seeds if the kind has no such saving).
    """
    known = [recipe for recipe in recipes.values() if recipe.kind == kind]
    sound = [_cells(recipe, SEEDS) for recipe in known]
    cells = sound if any(sound) else [_cells(recipe, 0) for recipe in known]
    if not any(cells):
        return pooled(recipes, kind, kind)

    def losses(own: Mapping[tuple[object, ...], float]) -> int:
        paired = [[other[c] - own[c] for c in own if c in other] for other in cells]
        return sum(mean(gains) >= BEATS for gains in paired if gains)

    ranked = [
        (losses(own), -len({setup for setup, *_ in own}), -recipe.kept, recipe)
        for recipe, own in zip(known, cells, strict=True)
        if own
    ]
    return min(ranked, key=lambda row: row[:3])[-1]


def _cells(recipe: Recipe, n_seeds: int) -> dict[tuple[object, ...], float]:
    """Return (setup, growth point, budget) -> saved share, of the savings with at least ``n_seeds`` seeds."""
    sound = [saved for saved in recipe.saved if saved.n_seeds >= n_seeds]
    return {(saved.setup, saved.grown_at, saved.budget): saved.charged[1] for saved in sound}


def recipe_of(event: Event, kind: str) -> Recipe:
    """Return the measured recipe with an event's methods, state and dynamics; else the pooled recipe of the kind."""

    def settings(growth: Mapping[str, object]) -> tuple[object, ...]:
        methods = (growth.get(axis) or METHODS[axis] for axis in KINDS[kind])
        return *methods, growth.get("state", "exact"), growth.get("dynamics", "mup")

    asked = settings(vars(event))
    known = [recipe for recipe in RECIPES.values() if recipe.kind == kind]
    matching = [recipe for recipe in known if settings(recipe.growth) == asked]
    names = [type(method).__name__ for method in asked[: len(KINDS[kind])]]
    return matching[0] if matching else pooled(RECIPES, kind, " and ".join(names))


def pooled(recipes: Mapping[str, Recipe], kind: str, name: str) -> Recipe:
    """Return mean and spread of the measured recipes of a kind (of all kinds if the kind has none), for an unmeasured recipe."""
    known = [recipe for recipe in recipes.values() if recipe.kind == kind] or [*recipes.values()]
    kept, sd = _mixture([(recipe.kept, recipe.sd) for recipe in known])
    worth = mean(recipe.worth[0] for recipe in known), max(recipe.worth[1] for recipe in known)
    return Recipe(
        name, kind, kept, sd, 0, worth=worth, pace=_mixture([recipe.pace for recipe in known])
    )


def _mixture(parts: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Return mean and standard deviation of a mixture of distributions, from theirs."""
    middle = mean(center for center, _ in parts)
    return middle, mean(sd**2 + (center - middle) ** 2 for center, sd in parts) ** 0.5
