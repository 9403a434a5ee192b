"""Recipes of growth, and what they saved, as measured. Written by ``python -m bench.advice --write``; not by hand.

From 89 figures (recipes, growth points, budgets) of bench/results/savings-*.csv, setups: width, depth.
"""

from math import nan

from growkern import depth, width
from growkern.recipes.recipe import Recipe, Saved

MEASURED = "60 to 230 thousand parameters (bytes of Python source)"
BUDGETS = 2.4, 10  # multiples of the compute at growth
RECIPES: dict[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        Recipe(
            "default", "width", 0.772, 0.187, 3,
            {}, 1, 0,
            (
                Saved("width", 1.78e+11, 4.45e+11, (0.292, 0.343, 0.394), (0.575, 0.606, 0.636), 0.408, 3),
                Saved("width", 1.78e+11, 7.43e+11, (0.128, 0.215, 0.302), (0.338, 0.404, 0.47), 0.292, 3),
                Saved("width", 1.78e+11, 1.19e+12, (-0.006, 0.113, 0.233), (0.145, 0.246, 0.348), 0.205, 3),
            ),
            (1.137, 0.1),
        ),
        Recipe(
            "default, one rate", "width", 0.826, 0.187, 3,
            {"dynamics": None}, 0.5, 0,
            (
                Saved("width", 1.78e+11, 4.45e+11, (0.303, 0.358, 0.413), (0.582, 0.615, 0.648), 0.408, 3),
                Saved("width", 1.78e+11, 7.43e+11, (0.16, 0.228, 0.297), (0.362, 0.414, 0.465), 0.292, 3),
                Saved("width", 1.78e+11, 1.19e+12, (0.025, 0.142, 0.26), (0.171, 0.271, 0.371), 0.205, 3),
            ),
            (1.137, 0.1),
        ),
        Recipe(
            "Sparkling fresh", "width", 0.975, 0.187, 3,
            {"dynamics": None, "state": "drop", "width": width.Sparkling(fan_out='random', fan_in='zero')}, 0.5, 60,
            (
                Saved("width", 1.78e+11, 4.45e+11, (0.309, 0.36, 0.411), (0.586, 0.616, 0.646), 0.408, 3),
                Saved("width", 1.78e+11, 7.43e+11, (0.233, 0.283, 0.333), (0.417, 0.455, 0.493), 0.292, 3),
                Saved("width", 1.78e+11, 1.19e+12, (0.147, 0.222, 0.296), (0.275, 0.338, 0.402), 0.205, 3),
            ),
            (1.137, 0.1),
        ),
        Recipe(
            "FreshFeatures", "width", 0.909, 0.187, 3,
            {"dynamics": None, "width": width.FreshFeatures()}, 0.5, 0,
            (
                Saved("width", 1.78e+11, 4.45e+11, (0.27, 0.33, 0.391), (0.562, 0.598, 0.635), 0.408, 3),
                Saved("width", 1.78e+11, 7.43e+11, (0.21, 0.266, 0.322), (0.399, 0.442, 0.485), 0.292, 3),
                Saved("width", 1.78e+11, 1.19e+12, (0.11, 0.201, 0.292), (0.243, 0.321, 0.398), 0.205, 3),
            ),
            (1.137, 0.1),
        ),
        Recipe(
            "FreshFeatures, dropped", "width", 0.939, 0.187, 3,
            {"dynamics": None, "state": "drop", "width": width.FreshFeatures()}, 0.5, 60,
            (
                Saved("width", 1.78e+11, 4.45e+11, (0.301, 0.357, 0.412), (0.581, 0.614, 0.648), 0.408, 3),
                Saved("width", 1.78e+11, 7.43e+11, (0.22, 0.266, 0.313), (0.407, 0.442, 0.478), 0.292, 3),
                Saved("width", 1.78e+11, 1.19e+12, (0.117, 0.209, 0.301), (0.249, 0.328, 0.406), 0.205, 3),
            ),
            (1.137, 0.1),
        ),
        Recipe(
            "default, dropped", "width", 0.811, 0.187, 3,
            {"dynamics": None, "state": "drop"}, 0.5, 60,
            (
                Saved("width", 1.78e+11, 4.45e+11, (0.289, 0.35, 0.411), (0.574, 0.61, 0.647), 0.408, 3),
                Saved("width", 1.78e+11, 7.43e+11, (0.139, 0.221, 0.304), (0.345, 0.408, 0.471), 0.292, 3),
                Saved("width", 1.78e+11, 1.19e+12, (0.028, 0.14, 0.252), (0.174, 0.269, 0.365), 0.205, 3),
            ),
            (1.137, 0.1),
        ),
        Recipe(
            "noise 0", "width", 0.359, 0.41, 3,
            {"width": width.Lossless(noise=0, norms=None)}, 1, 0,
            (
                Saved("width", 1.78e+11, 4.45e+11, (0.255, 0.287, 0.318), (0.553, 0.572, 0.591), 0.408, 3),
                Saved("width", 1.78e+11, 7.43e+11, (-0.048, 0.03, 0.109), (0.204, 0.263, 0.323), 0.292, 3),
                Saved("width", 1.78e+11, 1.19e+12, (-0.339, -0.222, -0.105), (-0.138, -0.038, 0.061), 0.205, 3),
            ),
            (1.137, 0.1),
        ),
        Recipe(
            "noise 0.3", "width", 0.617, 0.212, 3,
            {"width": width.Lossless(noise=0.3, norms=None)}, 1, 0,
            (
                Saved("width", 1.78e+11, 4.45e+11, (0.285, 0.322, 0.36), (0.571, 0.594, 0.616), 0.408, 3),
                Saved("width", 1.78e+11, 7.43e+11, (0.084, 0.159, 0.235), (0.304, 0.361, 0.418), 0.292, 3),
                Saved("width", 1.78e+11, 1.19e+12, (-0.11, 0.008, 0.127), (0.056, 0.157, 0.258), 0.205, 3),
            ),
            (1.137, 0.1),
        ),
        Recipe(
            "HyperClone", "width", 0.7, 0.187, 3,
            {"dynamics": None, "width": width.HyperClone(noise_db=10, general=False)}, 0.5, 0,
            (
                Saved("width", 1.78e+11, 4.45e+11, (0.298, 0.335, 0.372), (0.579, 0.601, 0.624), 0.408, 3),
                Saved("width", 1.78e+11, 7.43e+11, (0.128, 0.19, 0.252), (0.337, 0.384, 0.431), 0.292, 3),
                Saved("width", 1.78e+11, 1.19e+12, (-0.044, 0.066, 0.176), (0.113, 0.206, 0.3), 0.205, 3),
            ),
            (1.137, 0.1),
        ),
        Recipe(
            "Lemon", "width", 0.529, 0.261, 3,
            {"dynamics": None, "width": width.Lemon(expansion=None, alpha=0.6)}, 0.5, 0,
            (
                Saved("width", 1.78e+11, 4.45e+11, (0.27, 0.305, 0.341), (0.562, 0.583, 0.605), 0.408, 3),
                Saved("width", 1.78e+11, 7.43e+11, (0.043, 0.112, 0.182), (0.273, 0.325, 0.378), 0.292, 3),
                Saved("width", 1.78e+11, 1.19e+12, (-0.176, -0.049, 0.077), (0.001, 0.108, 0.216), 0.205, 3),
            ),
            (1.137, 0.1),
        ),
        Recipe(
            "AKI", "width", 0.66, 0.187, 3,
            {"dynamics": None, "width": width.AKI(maps='random', seed=0)}, 0.5, 0,
            (
                Saved("width", 1.78e+11, 4.45e+11, (0.28, 0.306, 0.333), (0.568, 0.584, 0.6), 0.408, 3),
                Saved("width", 1.78e+11, 7.43e+11, (0.122, 0.174, 0.226), (0.333, 0.372, 0.412), 0.292, 3),
                Saved("width", 1.78e+11, 1.19e+12, (0.007, 0.057, 0.107), (0.156, 0.198, 0.241), 0.205, 3),
            ),
            (1.137, 0.1),
        ),
        Recipe(
            "CopyAndPad", "width", 0.881, 0.187, 3,
            {"dynamics": None, "width": width.CopyAndPad(norm='corrected', std=1.0)}, 0.5, 0,
            (
                Saved("width", 1.78e+11, 4.45e+11, (0.309, 0.36, 0.41), (0.586, 0.616, 0.646), 0.408, 3),
                Saved("width", 1.78e+11, 7.43e+11, (0.178, 0.249, 0.32), (0.375, 0.429, 0.483), 0.292, 3),
                Saved("width", 1.78e+11, 1.19e+12, (0.057, 0.173, 0.289), (0.199, 0.297, 0.395), 0.205, 3),
            ),
            (1.137, 0.1),
        ),
        Recipe(
            "Sparkling fresh, state", "width", 0.971, 0.187, 3,
            {"dynamics": None, "width": width.Sparkling(fan_out='random', fan_in='zero')}, 0.5, 0,
            (
                Saved("width", 1.78e+11, 4.45e+11, (0.314, 0.364, 0.414), (0.589, 0.619, 0.649), 0.408, 3),
                Saved("width", 1.78e+11, 7.43e+11, (0.237, 0.282, 0.327), (0.42, 0.454, 0.489), 0.292, 3),
                Saved("width", 1.78e+11, 1.19e+12, (0.142, 0.217, 0.293), (0.27, 0.335, 0.399), 0.205, 3),
            ),
            (1.137, 0.1),
        ),
        Recipe(
            "noise 2", "width", 0.447, 0.187, 3,
            {"dynamics": None, "width": width.Lossless(noise=2, norms=None)}, 1, 0,
            (
                Saved("width", 1.78e+11, 4.45e+11, (nan, 0.202, nan), (nan, 0.522, nan), 0.332, 0),
                Saved("width", 1.78e+11, 7.43e+11, (nan, 0.05, nan), (nan, 0.278, nan), 0.23, 0),
                Saved("width", 1.78e+11, 1.19e+12, (nan, -0.032, nan), (nan, 0.123, nan), 0.157, 0),
            ),
            (1.137, 0.1),
        ),
        Recipe(
            "noise 2, law's rates", "width", 0.399, 0.192, 3,
            {"width": width.Lossless(noise=2, norms=None)}, 1, 0,
            (
                Saved("width", 1.78e+11, 4.45e+11, (nan, 0.196, nan), (nan, 0.518, nan), 0.332, 0),
                Saved("width", 1.78e+11, 7.43e+11, (nan, 0.018, nan), (nan, 0.254, nan), 0.23, 0),
                Saved("width", 1.78e+11, 1.19e+12, (nan, -0.069, nan), (nan, 0.091, nan), 0.157, 0),
            ),
            (1.137, 0.1),
        ),
        Recipe(
            "CopyAndPad, law's rates", "width", 0.611, 0.187, 3,
            {"width": width.CopyAndPad(norm='corrected', std=1.0)}, 1, 0,
            (
                Saved("width", 1.78e+11, 4.45e+11, (nan, 0.278, nan), (nan, 0.567, nan), 0.332, 0),
                Saved("width", 1.78e+11, 7.43e+11, (nan, 0.159, nan), (nan, 0.361, nan), 0.23, 0),
                Saved("width", 1.78e+11, 1.19e+12, (nan, 0.034, nan), (nan, 0.179, nan), 0.157, 0),
            ),
            (1.137, 0.1),
        ),
        Recipe(
            "noise 4", "width", -0.204, 0.187, 3,
            {"dynamics": None, "width": width.Lossless(noise=4, norms=None)}, 1, 0,
            (
                Saved("width", 1.78e+11, 4.45e+11, (nan, -1.238, nan), (nan, -0.342, nan), 0.332, 0),
                Saved("width", 1.78e+11, 7.43e+11, (nan, -0.525, nan), (nan, -0.159, nan), 0.23, 0),
                Saved("width", 1.78e+11, 1.19e+12, (nan, -0.384, nan), (nan, -0.176, nan), 0.157, 0),
            ),
            (1.137, 0.1),
        ),
        Recipe(
            "FPI", "width", 0.389, 0.391, 3,
            {"dynamics": None, "width": width.FPI(maps='random', seed=0)}, 0.5, 0,
            (
                Saved("width", 1.78e+11, 4.45e+11, (0.238, 0.291, 0.345), (0.543, 0.575, 0.607), 0.408, 3),
                Saved("width", 1.78e+11, 7.43e+11, (-0.036, 0.051, 0.138), (0.212, 0.279, 0.345), 0.292, 3),
                Saved("width", 1.78e+11, 1.19e+12, (-0.289, -0.193, -0.097), (-0.096, -0.014, 0.067), 0.205, 3),
            ),
            (1.137, 0.1),
        ),
        Recipe(
            "Net2Wider", "width", 0.508, 0.293, 3,
            {"dynamics": None, "width": width.Net2Wider(maps='random', seed=0, noise=0.1)}, 0.5, 0,
            (
                Saved("width", 1.78e+11, 4.45e+11, (0.259, 0.304, 0.348), (0.556, 0.582, 0.609), 0.408, 3),
                Saved("width", 1.78e+11, 7.43e+11, (0.043, 0.113, 0.183), (0.272, 0.326, 0.379), 0.292, 3),
                Saved("width", 1.78e+11, 1.19e+12, (-0.204, -0.078, 0.048), (-0.023, 0.084, 0.191), 0.205, 3),
            ),
            (1.137, 0.1),
        ),
        Recipe(
            "CopyAndPad, as published", "width", 0.934, 0.187, 3,
            {"dynamics": None, "width": width.CopyAndPad(norm='as_published', std=1.0)}, 0.5, 0,
            (
                Saved("width", 1.78e+11, 4.45e+11, (0.299, 0.36, 0.422), (0.579, 0.616, 0.653), 0.408, 3),
                Saved("width", 1.78e+11, 7.43e+11, (0.199, 0.263, 0.328), (0.391, 0.44, 0.489), 0.292, 3),
                Saved("width", 1.78e+11, 1.19e+12, (0.105, 0.205, 0.305), (0.24, 0.325, 0.41), 0.205, 3),
            ),
            (1.137, 0.1),
        ),
        Recipe(
            "Sparkling", "width", 0.514, 0.291, 3,
            {"dynamics": None, "state": "asymmetric", "width": width.Sparkling(fan_out='copy', fan_in='copy')}, 0.5, 0,
            (
                Saved("width", 1.78e+11, 4.45e+11, (0.273, 0.308, 0.343), (0.564, 0.585, 0.606), 0.408, 3),
                Saved("width", 1.78e+11, 7.43e+11, (0.039, 0.114, 0.188), (0.269, 0.326, 0.383), 0.292, 3),
                Saved("width", 1.78e+11, 1.19e+12, (-0.213, -0.073, 0.067), (-0.031, 0.088, 0.207), 0.205, 3),
            ),
            (1.137, 0.1),
        ),
        Recipe(
            "Stack, dropped", "depth", 1.572, 0.886, 3,
            {"dynamics": None, "state": "drop", "depth": depth.Stack(remainder='bottom', ignore_first=0, ignore_last=0)}, 1, 60,
            (
                Saved("depth", 1.07e+11, 2.68e+11, (nan, 0.346, nan), (nan, 0.607, nan), 0.38, 0),
                Saved("depth", 1.07e+11, 5.36e+11, (nan, 0.295, nan), (nan, 0.436, nan), 0.235, 0),
                Saved("depth", 1.07e+11, 1.07e+12, (nan, 0.356, nan), (nan, 0.421, nan), 0.133, 0),
            ),
            (0.934, 0.1),
        ),
        Recipe(
            "Stack", "depth", 1.567, 0.899, 3,
            {"dynamics": None, "depth": depth.Stack(remainder='bottom', ignore_first=0, ignore_last=0)}, 1, 0,
            (
                Saved("depth", 1.07e+11, 2.68e+11, (nan, 0.356, nan), (nan, 0.613, nan), 0.38, 0),
                Saved("depth", 1.07e+11, 5.36e+11, (nan, 0.28, nan), (nan, 0.424, nan), 0.235, 0),
                Saved("depth", 1.07e+11, 1.07e+12, (nan, 0.358, nan), (nan, 0.422, nan), 0.133, 0),
            ),
            (0.934, 0.1),
        ),
        Recipe(
            "Interpose", "depth", 1.361, 0.681, 3,
            {"dynamics": None, "depth": depth.Interpose(halve_branches=True, ignore_first=0, ignore_last=0)}, 1, 0,
            (
                Saved("depth", 1.07e+11, 2.68e+11, (nan, 0.336, nan), (nan, 0.602, nan), 0.38, 0),
                Saved("depth", 1.07e+11, 5.36e+11, (nan, 0.285, nan), (nan, 0.428, nan), 0.235, 0),
                Saved("depth", 1.07e+11, 1.07e+12, (nan, 0.29, nan), (nan, 0.361, nan), 0.133, 0),
            ),
            (0.934, 0.1),
        ),
        Recipe(
            "Interpose, dropped", "depth", 1.378, 0.681, 3,
            {"dynamics": None, "state": "drop", "depth": depth.Interpose(halve_branches=True, ignore_first=0, ignore_last=0)}, 1, 60,
            (
                Saved("depth", 1.07e+11, 2.68e+11, (nan, 0.336, nan), (nan, 0.602, nan), 0.38, 0),
                Saved("depth", 1.07e+11, 5.36e+11, (nan, 0.282, nan), (nan, 0.425, nan), 0.235, 0),
                Saved("depth", 1.07e+11, 1.07e+12, (nan, 0.298, nan), (nan, 0.368, nan), 0.133, 0),
            ),
            (0.934, 0.1),
        ),
        Recipe(
            "IdentityBlocks", "depth", 1.15, 0.681, 3,
            {"dynamics": None, "depth": depth.IdentityBlocks()}, 1, 0,
            (
                Saved("depth", 1.07e+11, 2.68e+11, (nan, 0.369, nan), (nan, 0.621, nan), 0.38, 0),
                Saved("depth", 1.07e+11, 5.36e+11, (nan, 0.247, nan), (nan, 0.398, nan), 0.235, 0),
                Saved("depth", 1.07e+11, 1.07e+12, (nan, 0.208, nan), (nan, 0.288, nan), 0.133, 0),
            ),
            (0.934, 0.1),
        ),
        Recipe(
            "Fresh", "depth", 1.354, 0.681, 3,
            {"dynamics": None, "depth": depth.Fresh(at='top')}, 1, 0,
            (
                Saved("depth", 1.07e+11, 2.68e+11, (nan, 0.359, nan), (nan, 0.615, nan), 0.38, 0),
                Saved("depth", 1.07e+11, 5.36e+11, (nan, 0.278, nan), (nan, 0.422, nan), 0.235, 0),
                Saved("depth", 1.07e+11, 1.07e+12, (nan, 0.284, nan), (nan, 0.356, nan), 0.133, 0),
            ),
            (0.934, 0.1),
        ),
    )
}  # fmt: skip
