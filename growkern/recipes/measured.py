"""Recipes of growth, and what they saved, as measured. Written by ``python -m bench.advice --write``; not by hand.

From 144 figures (recipes, growth points, budgets) of bench/results/savings-*.csv, setups:
width, width, c++, wider, depth, depth, twice, both.
"""

from math import nan

from growkern import depth, width
from growkern.recipes.recipe import Recipe, Saved

MEASURED = "60 to 870 thousand parameters (bytes of Python and C++ source)"
BUDGETS = 1.3, 13.4  # multiples of the compute at growth
RECIPES: dict[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        Recipe(
            "noise 1", "width", 0.772, 0.205, 3,
            {"width": width.Lossless(noise=1, norms=None)}, 1, 0,
            (
                Saved("width", 1.78e+11, 4.45e+11, (0.292, 0.343, 0.394), (0.575, 0.606, 0.636), 0.408, 3),
                Saved("width", 1.78e+11, 7.43e+11, (0.128, 0.215, 0.302), (0.338, 0.404, 0.47), 0.292, 3),
                Saved("width", 1.78e+11, 1.19e+12, (-0.006, 0.113, 0.233), (0.145, 0.246, 0.348), 0.205, 3),
            ),
            (1.104, 0.151),
        ),
        Recipe(
            "noise 1, one rate", "width", 0.701, 0.205, 6,
            {"dynamics": None, "width": width.Lossless(noise=1, norms=None)}, 0.5, 0,
            (
                Saved("width", 1.78e+11, 4.45e+11, (0.303, 0.358, 0.413), (0.582, 0.615, 0.648), 0.408, 3),
                Saved("width", 1.78e+11, 7.43e+11, (0.16, 0.228, 0.297), (0.362, 0.414, 0.465), 0.292, 3),
                Saved("width", 1.78e+11, 1.19e+12, (0.025, 0.142, 0.26), (0.171, 0.271, 0.371), 0.205, 3),
                Saved("width, c++", 1.78e+11, 4.45e+11, (0.113, 0.236, 0.36), (0.468, 0.542, 0.616), 0.372, 3),
                Saved("width, c++", 1.78e+11, 7.43e+11, (0.026, 0.119, 0.212), (0.26, 0.33, 0.401), 0.262, 3),
                Saved("width, c++", 1.78e+11, 1.19e+12, (-0.113, -0.007, 0.099), (0.054, 0.144, 0.234), 0.181, 3),
            ),
            (1.104, 0.151),
        ),
        Recipe(
            "Sparkling fresh", "width", 0.999, 0.363, 16,
            {"dynamics": None, "state": "drop", "width": width.Sparkling(fan_out='random', fan_in='zero')}, 0.5, 60,
            (
                Saved("width", 1.78e+11, 4.45e+11, (0.309, 0.36, 0.411), (0.586, 0.616, 0.646), 0.408, 3),
                Saved("width", 8.87e+10, 4.45e+11, (nan, 0.36, nan), (nan, 0.488, nan), 0.293, 1),
                Saved("width", 3.34e+11, 4.45e+11, (nan, 0.32, nan), (nan, 0.83, nan), 0.41, 0),
                Saved("width", 1.78e+11, 7.43e+11, (0.233, 0.283, 0.333), (0.417, 0.455, 0.493), 0.292, 3),
                Saved("width", 8.87e+10, 7.43e+11, (nan, 0.264, nan), (nan, 0.352, nan), 0.199, 1),
                Saved("width", 3.34e+11, 7.43e+11, (nan, 0.327, nan), (nan, 0.629, nan), 0.375, 1),
                Saved("width", 1.78e+11, 1.19e+12, (0.147, 0.222, 0.296), (0.275, 0.338, 0.402), 0.205, 3),
                Saved("width", 8.87e+10, 1.19e+12, (nan, 0.291, nan), (nan, 0.344, nan), 0.134, 1),
                Saved("width", 3.34e+11, 1.19e+12, (nan, 0.253, nan), (nan, 0.463, nan), 0.273, 1),
                Saved("width", 6.68e+11, 1.19e+12, (nan, 0.247, nan), (nan, 0.67, nan), 0.309, 1),
                Saved("width, c++", 1.78e+11, 4.45e+11, (0.225, 0.271, 0.318), (0.535, 0.563, 0.591), 0.372, 3),
                Saved("width, c++", 1.78e+11, 7.43e+11, (-0.008, 0.125, 0.258), (0.234, 0.335, 0.436), 0.262, 3),
                Saved("width, c++", 1.78e+11, 1.19e+12, (-0.125, 0.025, 0.176), (0.043, 0.172, 0.3), 0.181, 3),
                Saved("wider", 6.1e+11, 1.52e+12, (nan, 0.371, nan), (nan, 0.623, nan), 0.398, 1),
                Saved("wider", 6.1e+11, 2.54e+12, (nan, 0.294, nan), (nan, 0.464, nan), 0.284, 1),
                Saved("wider", 6.1e+11, 4.06e+12, (nan, 0.222, nan), (nan, 0.339, nan), 0.199, 1),
            ),
            (1.104, 0.151),
        ),
        Recipe(
            "FreshFeatures", "width", 0.909, 0.205, 3,
            {"dynamics": None, "width": width.FreshFeatures()}, 0.5, 0,
            (
                Saved("width", 1.78e+11, 4.45e+11, (0.27, 0.33, 0.391), (0.562, 0.598, 0.635), 0.408, 3),
                Saved("width", 1.78e+11, 7.43e+11, (0.21, 0.266, 0.322), (0.399, 0.442, 0.485), 0.292, 3),
                Saved("width", 1.78e+11, 1.19e+12, (0.11, 0.201, 0.292), (0.243, 0.321, 0.398), 0.205, 3),
            ),
            (1.104, 0.151),
        ),
        Recipe(
            "FreshFeatures, dropped", "width", 0.939, 0.205, 3,
            {"dynamics": None, "state": "drop", "width": width.FreshFeatures()}, 0.5, 60,
            (
                Saved("width", 1.78e+11, 4.45e+11, (0.301, 0.357, 0.412), (0.581, 0.614, 0.648), 0.408, 3),
                Saved("width", 1.78e+11, 7.43e+11, (0.22, 0.266, 0.313), (0.407, 0.442, 0.478), 0.292, 3),
                Saved("width", 1.78e+11, 1.19e+12, (0.117, 0.209, 0.301), (0.249, 0.328, 0.406), 0.205, 3),
            ),
            (1.104, 0.151),
        ),
        Recipe(
            "noise 1, dropped", "width", 0.811, 0.205, 3,
            {"dynamics": None, "state": "drop", "width": width.Lossless(noise=1, norms=None)}, 0.5, 60,
            (
                Saved("width", 1.78e+11, 4.45e+11, (0.289, 0.35, 0.411), (0.574, 0.61, 0.647), 0.408, 3),
                Saved("width", 1.78e+11, 7.43e+11, (0.139, 0.221, 0.304), (0.345, 0.408, 0.471), 0.292, 3),
                Saved("width", 1.78e+11, 1.19e+12, (0.028, 0.14, 0.252), (0.174, 0.269, 0.365), 0.205, 3),
            ),
            (1.104, 0.151),
        ),
        Recipe(
            "noise 0", "width", 0.359, 0.41, 3,
            {"width": width.Lossless(noise=0, norms=None)}, 1, 0,
            (
                Saved("width", 1.78e+11, 4.45e+11, (0.255, 0.287, 0.318), (0.553, 0.572, 0.591), 0.408, 3),
                Saved("width", 1.78e+11, 7.43e+11, (-0.048, 0.03, 0.109), (0.204, 0.263, 0.323), 0.292, 3),
                Saved("width", 1.78e+11, 1.19e+12, (-0.339, -0.222, -0.105), (-0.138, -0.038, 0.061), 0.205, 3),
            ),
            (1.104, 0.151),
        ),
        Recipe(
            "noise 0.3", "width", 0.617, 0.212, 3,
            {"width": width.Lossless(noise=0.3, norms=None)}, 1, 0,
            (
                Saved("width", 1.78e+11, 4.45e+11, (0.285, 0.322, 0.36), (0.571, 0.594, 0.616), 0.408, 3),
                Saved("width", 1.78e+11, 7.43e+11, (0.084, 0.159, 0.235), (0.304, 0.361, 0.418), 0.292, 3),
                Saved("width", 1.78e+11, 1.19e+12, (-0.11, 0.008, 0.127), (0.056, 0.157, 0.258), 0.205, 3),
            ),
            (1.104, 0.151),
        ),
        Recipe(
            "HyperClone", "width", 0.7, 0.205, 3,
            {"dynamics": None, "width": width.HyperClone(noise_db=10, general=False)}, 0.5, 0,
            (
                Saved("width", 1.78e+11, 4.45e+11, (0.298, 0.335, 0.372), (0.579, 0.601, 0.624), 0.408, 3),
                Saved("width", 1.78e+11, 7.43e+11, (0.128, 0.19, 0.252), (0.337, 0.384, 0.431), 0.292, 3),
                Saved("width", 1.78e+11, 1.19e+12, (-0.044, 0.066, 0.176), (0.113, 0.206, 0.3), 0.205, 3),
            ),
            (1.104, 0.151),
        ),
        Recipe(
            "Lemon", "width", 0.529, 0.261, 3,
            {"dynamics": None, "width": width.Lemon(expansion=None, alpha=0.6)}, 0.5, 0,
            (
                Saved("width", 1.78e+11, 4.45e+11, (0.27, 0.305, 0.341), (0.562, 0.583, 0.605), 0.408, 3),
                Saved("width", 1.78e+11, 7.43e+11, (0.043, 0.112, 0.182), (0.273, 0.325, 0.378), 0.292, 3),
                Saved("width", 1.78e+11, 1.19e+12, (-0.176, -0.049, 0.077), (0.001, 0.108, 0.216), 0.205, 3),
            ),
            (1.104, 0.151),
        ),
        Recipe(
            "AKI", "width", 0.66, 0.205, 3,
            {"dynamics": None, "width": width.AKI(maps='random', seed=0)}, 0.5, 0,
            (
                Saved("width", 1.78e+11, 4.45e+11, (0.28, 0.306, 0.333), (0.568, 0.584, 0.6), 0.408, 3),
                Saved("width", 1.78e+11, 7.43e+11, (0.122, 0.174, 0.226), (0.333, 0.372, 0.412), 0.292, 3),
                Saved("width", 1.78e+11, 1.19e+12, (0.007, 0.057, 0.107), (0.156, 0.198, 0.241), 0.205, 3),
            ),
            (1.104, 0.151),
        ),
        Recipe(
            "Sparkling fresh, state", "width", 0.838, 0.205, 6,
            {"dynamics": None, "width": width.Sparkling(fan_out='random', fan_in='zero')}, 0.5, 0,
            (
                Saved("width", 1.78e+11, 4.45e+11, (0.314, 0.364, 0.414), (0.589, 0.619, 0.649), 0.408, 3),
                Saved("width", 1.78e+11, 7.43e+11, (0.237, 0.282, 0.327), (0.42, 0.454, 0.489), 0.292, 3),
                Saved("width", 1.78e+11, 1.19e+12, (0.142, 0.217, 0.293), (0.27, 0.335, 0.399), 0.205, 3),
                Saved("width, c++", 1.78e+11, 4.45e+11, (0.182, 0.261, 0.339), (0.509, 0.557, 0.604), 0.372, 3),
                Saved("width, c++", 1.78e+11, 7.43e+11, (0.109, 0.177, 0.244), (0.323, 0.374, 0.426), 0.262, 3),
                Saved("width, c++", 1.78e+11, 1.19e+12, (-0.087, 0.065, 0.217), (0.076, 0.206, 0.335), 0.181, 3),
            ),
            (1.104, 0.151),
        ),
        Recipe(
            "noise 2, one rate", "width", 0.447, 0.205, 3,
            {"dynamics": None, "width": width.Lossless(noise=2, norms=None)}, 1, 0,
            (
                Saved("width", 1.78e+11, 4.45e+11, (nan, 0.202, nan), (nan, 0.522, nan), 0.332, 0),
                Saved("width", 1.78e+11, 7.43e+11, (nan, 0.05, nan), (nan, 0.278, nan), 0.23, 0),
                Saved("width", 1.78e+11, 1.19e+12, (nan, -0.032, nan), (nan, 0.123, nan), 0.157, 0),
            ),
            (1.104, 0.151),
        ),
        Recipe(
            "noise 2", "width", 0.399, 0.205, 3,
            {"width": width.Lossless(noise=2, norms=None)}, 1, 0,
            (
                Saved("width", 1.78e+11, 4.45e+11, (nan, 0.196, nan), (nan, 0.518, nan), 0.332, 0),
                Saved("width", 1.78e+11, 7.43e+11, (nan, 0.018, nan), (nan, 0.254, nan), 0.23, 0),
                Saved("width", 1.78e+11, 1.19e+12, (nan, -0.069, nan), (nan, 0.091, nan), 0.157, 0),
            ),
            (1.104, 0.151),
        ),
        Recipe(
            "noise 4, one rate", "width", -0.204, 0.205, 3,
            {"dynamics": None, "width": width.Lossless(noise=4, norms=None)}, 1, 0,
            (
                Saved("width", 1.78e+11, 4.45e+11, (nan, -1.238, nan), (nan, -0.342, nan), 0.332, 0),
                Saved("width", 1.78e+11, 7.43e+11, (nan, -0.525, nan), (nan, -0.159, nan), 0.23, 0),
                Saved("width", 1.78e+11, 1.19e+12, (nan, -0.384, nan), (nan, -0.176, nan), 0.157, 0),
            ),
            (1.104, 0.151),
        ),
        Recipe(
            "FPI", "width", 0.389, 0.391, 3,
            {"dynamics": None, "width": width.FPI(maps='random', seed=0)}, 0.5, 0,
            (
                Saved("width", 1.78e+11, 4.45e+11, (0.238, 0.291, 0.345), (0.543, 0.575, 0.607), 0.408, 3),
                Saved("width", 1.78e+11, 7.43e+11, (-0.036, 0.051, 0.138), (0.212, 0.279, 0.345), 0.292, 3),
                Saved("width", 1.78e+11, 1.19e+12, (-0.289, -0.193, -0.097), (-0.096, -0.014, 0.067), 0.205, 3),
            ),
            (1.104, 0.151),
        ),
        Recipe(
            "Net2Wider", "width", 0.508, 0.293, 3,
            {"dynamics": None, "width": width.Net2Wider(maps='random', seed=0, noise=0.1)}, 0.5, 0,
            (
                Saved("width", 1.78e+11, 4.45e+11, (0.259, 0.304, 0.348), (0.556, 0.582, 0.609), 0.408, 3),
                Saved("width", 1.78e+11, 7.43e+11, (0.043, 0.113, 0.183), (0.272, 0.326, 0.379), 0.292, 3),
                Saved("width", 1.78e+11, 1.19e+12, (-0.204, -0.078, 0.048), (-0.023, 0.084, 0.191), 0.205, 3),
            ),
            (1.104, 0.151),
        ),
        Recipe(
            "CopyAndPad, as published", "width", 0.934, 0.205, 3,
            {"dynamics": None, "width": width.CopyAndPad(norm='as_published', std=1.0)}, 0.5, 0,
            (
                Saved("width", 1.78e+11, 4.45e+11, (0.299, 0.36, 0.422), (0.579, 0.616, 0.653), 0.408, 3),
                Saved("width", 1.78e+11, 7.43e+11, (0.199, 0.263, 0.328), (0.391, 0.44, 0.489), 0.292, 3),
                Saved("width", 1.78e+11, 1.19e+12, (0.105, 0.205, 0.305), (0.24, 0.325, 0.41), 0.205, 3),
            ),
            (1.104, 0.151),
        ),
        Recipe(
            "Sparkling", "width", 0.514, 0.291, 3,
            {"dynamics": None, "state": "asymmetric", "width": width.Sparkling(fan_out='copy', fan_in='copy')}, 0.5, 0,
            (
                Saved("width", 1.78e+11, 4.45e+11, (0.273, 0.308, 0.343), (0.564, 0.585, 0.606), 0.408, 3),
                Saved("width", 1.78e+11, 7.43e+11, (0.039, 0.114, 0.188), (0.269, 0.326, 0.383), 0.292, 3),
                Saved("width", 1.78e+11, 1.19e+12, (-0.213, -0.073, 0.067), (-0.031, 0.088, 0.207), 0.205, 3),
            ),
            (1.104, 0.151),
        ),
        Recipe(
            "default", "width", 0.789, 0.205, 3,
            {}, 1, 0,
            (
                Saved("width", 1.78e+11, 4.45e+11, (0.278, 0.333, 0.387), (0.567, 0.6, 0.632), 0.408, 3),
                Saved("width", 1.78e+11, 7.43e+11, (0.153, 0.214, 0.275), (0.356, 0.403, 0.449), 0.292, 3),
                Saved("width", 1.78e+11, 1.19e+12, (-0.001, 0.136, 0.274), (0.149, 0.266, 0.383), 0.205, 3),
            ),
            (1.104, 0.151),
        ),
        Recipe(
            "default, one rate", "width", 0.902, 0.213, 16,
            {"dynamics": None}, 0.5, 0,
            (
                Saved("width", 1.78e+11, 4.45e+11, (0.311, 0.361, 0.412), (0.587, 0.617, 0.647), 0.408, 3),
                Saved("width", 8.87e+10, 4.45e+11, (nan, 0.327, nan), (nan, 0.461, nan), 0.293, 1),
                Saved("width", 3.34e+11, 4.45e+11, (nan, 0.337, nan), (nan, 0.834, nan), 0.41, 0),
                Saved("width", 1.78e+11, 7.43e+11, (0.181, 0.251, 0.322), (0.377, 0.431, 0.485), 0.292, 3),
                Saved("width", 8.87e+10, 7.43e+11, (nan, 0.246, nan), (nan, 0.336, nan), 0.199, 1),
                Saved("width", 3.34e+11, 7.43e+11, (nan, 0.326, nan), (nan, 0.629, nan), 0.375, 1),
                Saved("width", 1.78e+11, 1.19e+12, (0.066, 0.181, 0.295), (0.206, 0.304, 0.401), 0.205, 3),
                Saved("width", 8.87e+10, 1.19e+12, (nan, 0.193, nan), (nan, 0.253, nan), 0.134, 1),
                Saved("width", 3.34e+11, 1.19e+12, (nan, 0.205, nan), (nan, 0.429, nan), 0.273, 1),
                Saved("width", 6.68e+11, 1.19e+12, (nan, 0.248, nan), (nan, 0.671, nan), 0.309, 1),
                Saved("width, c++", 1.78e+11, 4.45e+11, (0.185, 0.275, 0.364), (0.511, 0.565, 0.619), 0.372, 3),
                Saved("width, c++", 1.78e+11, 7.43e+11, (0.104, 0.131, 0.159), (0.319, 0.34, 0.361), 0.262, 3),
                Saved("width, c++", 1.78e+11, 1.19e+12, (-0.09, 0.014, 0.118), (0.073, 0.162, 0.25), 0.181, 3),
                Saved("wider", 6.1e+11, 1.52e+12, (nan, 0.389, nan), (nan, 0.634, nan), 0.398, 1),
                Saved("wider", 6.1e+11, 2.54e+12, (nan, 0.262, nan), (nan, 0.439, nan), 0.284, 1),
                Saved("wider", 6.1e+11, 4.06e+12, (nan, 0.178, nan), (nan, 0.301, nan), 0.199, 1),
            ),
            (1.104, 0.151),
        ),
        Recipe(
            "default, dropped", "width", 0.881, 0.205, 3,
            {"dynamics": None, "state": "drop"}, 0.5, 60,
            (
                Saved("width", 1.78e+11, 4.45e+11, (0.302, 0.358, 0.414), (0.582, 0.615, 0.649), 0.408, 3),
                Saved("width", 1.78e+11, 7.43e+11, (0.187, 0.248, 0.309), (0.382, 0.428, 0.475), 0.292, 3),
                Saved("width", 1.78e+11, 1.19e+12, (0.08, 0.175, 0.27), (0.218, 0.299, 0.38), 0.205, 3),
            ),
            (1.104, 0.151),
        ),
        Recipe(
            "Stack, dropped", "depth", 1.374, 0.637, 3,
            {"dynamics": None,
             "state": "drop",
             "depth": depth.Stack(remainder='bottom', ignore_first=0, ignore_last=0)}, 1, 60,
            (
                Saved("depth", 1.07e+11, 2.68e+11, (0.158, 0.247, 0.337), (0.495, 0.548, 0.602), 0.313, 3),
                Saved("depth", 1.07e+11, 5.36e+11, (0.041, 0.235, 0.428), (0.233, 0.388, 0.543), 0.185, 3),
                Saved("depth", 1.07e+11, 1.07e+12, (0.089, 0.257, 0.425), (0.18, 0.331, 0.482), 0.102, 3),
            ),
            (0.957, 0.1),
        ),
        Recipe(
            "Stack", "depth", 1.543, 0.583, 6,
            {"dynamics": None, "depth": depth.Stack(remainder='bottom', ignore_first=0, ignore_last=0)}, 1, 0,
            (
                Saved("depth", 1.07e+11, 2.68e+11, (0.156, 0.243, 0.331), (0.493, 0.546, 0.598), 0.313, 3),
                Saved("depth", 1.07e+11, 5.36e+11, (0.057, 0.234, 0.411), (0.246, 0.387, 0.529), 0.185, 3),
                Saved("depth", 1.07e+11, 1.07e+12, (0.088, 0.235, 0.383), (0.179, 0.312, 0.445), 0.102, 3),
                Saved("depth, twice", 1.07e+11, 2.68e+11, (0.16, 0.31, 0.461), (0.496, 0.586, 0.676), 0.239, 3),
                Saved("depth, twice", 1.07e+11, 5.36e+11, (0.085, 0.289, 0.493), (0.268, 0.431, 0.594), 0.136, 3),
                Saved("depth, twice", 1.07e+11, 1.07e+12, (0.031, 0.251, 0.472), (0.128, 0.326, 0.524), 0.073, 3),
            ),
            (0.957, 0.1),
        ),
        Recipe(
            "Interpose", "depth", 1.33, 0.458, 6,
            {"dynamics": None, "depth": depth.Interpose(halve_branches=True, ignore_first=0, ignore_last=0)}, 1, 0,
            (
                Saved("depth", 1.07e+11, 2.68e+11, (0.139, 0.251, 0.363), (0.483, 0.551, 0.618), 0.313, 3),
                Saved("depth", 1.07e+11, 5.36e+11, (-0.073, 0.198, 0.468), (0.142, 0.358, 0.574), 0.185, 3),
                Saved("depth", 1.07e+11, 1.07e+12, (-0.14, 0.144, 0.428), (-0.026, 0.23, 0.486), 0.102, 3),
                Saved("depth, twice", 1.07e+11, 2.68e+11, (0.138, 0.294, 0.45), (0.483, 0.576, 0.67), 0.239, 3),
                Saved("depth, twice", 1.07e+11, 5.36e+11, (0.016, 0.262, 0.507), (0.213, 0.409, 0.606), 0.136, 3),
                Saved("depth, twice", 1.07e+11, 1.07e+12, (-0.076, 0.219, 0.513), (0.032, 0.297, 0.562), 0.073, 3),
            ),
            (0.957, 0.1),
        ),
        Recipe(
            "Interpose, dropped", "depth", 1.035, 0.458, 3,
            {"dynamics": None,
             "state": "drop",
             "depth": depth.Interpose(halve_branches=True, ignore_first=0, ignore_last=0)}, 1, 60,
            (
                Saved("depth", 1.07e+11, 2.68e+11, (0.135, 0.233, 0.332), (0.481, 0.54, 0.599), 0.313, 3),
                Saved("depth", 1.07e+11, 5.36e+11, (-0.08, 0.198, 0.476), (0.136, 0.359, 0.581), 0.185, 3),
                Saved("depth", 1.07e+11, 1.07e+12, (-0.133, 0.141, 0.415), (-0.02, 0.227, 0.474), 0.102, 3),
            ),
            (0.957, 0.1),
        ),
        Recipe(
            "IdentityBlocks", "depth", 0.891, 0.458, 3,
            {"dynamics": None, "depth": depth.IdentityBlocks()}, 1, 0,
            (
                Saved("depth", 1.07e+11, 2.68e+11, (0.176, 0.257, 0.338), (0.505, 0.554, 0.603), 0.313, 3),
                Saved("depth", 1.07e+11, 5.36e+11, (-0.103, 0.137, 0.378), (0.117, 0.31, 0.502), 0.185, 3),
                Saved("depth", 1.07e+11, 1.07e+12, (-0.198, 0.096, 0.389), (-0.078, 0.186, 0.45), 0.102, 3),
            ),
            (0.957, 0.1),
        ),
        Recipe(
            "Fresh", "depth", 1.206, 0.468, 3,
            {"dynamics": None, "depth": depth.Fresh(at='top')}, 1, 0,
            (
                Saved("depth", 1.07e+11, 2.68e+11, (0.146, 0.23, 0.315), (0.488, 0.538, 0.589), 0.313, 3),
                Saved("depth", 1.07e+11, 5.36e+11, (-0.0, 0.206, 0.413), (0.2, 0.365, 0.53), 0.185, 3),
                Saved("depth", 1.07e+11, 1.07e+12, (0.017, 0.212, 0.407), (0.115, 0.291, 0.466), 0.102, 3),
            ),
            (0.957, 0.1),
        ),
        Recipe(
            "Middle", "depth", 1.093, 0.458, 3,
            {"dynamics": None, "depth": depth.Layers(order=(0, 1, 0, 1, 0, 1, 2, 3))}, 1, 0,
            (
                Saved("depth, twice", 1.07e+11, 2.68e+11, (0.076, 0.247, 0.418), (0.445, 0.548, 0.651), 0.239, 3),
                Saved("depth, twice", 1.07e+11, 5.36e+11, (-0.151, 0.167, 0.485), (0.079, 0.334, 0.588), 0.136, 3),
                Saved("depth, twice", 1.07e+11, 1.07e+12, (-0.295, 0.094, 0.482), (-0.165, 0.184, 0.534), 0.073, 3),
            ),
            (0.957, 0.1),
        ),
        Recipe(
            "TopCopies", "depth", 1.775, 0.628, 3,
            {"dynamics": None, "depth": depth.TopCopies(n=None)}, 1, 0,
            (
                Saved("depth, twice", 1.07e+11, 2.68e+11, (0.16, 0.31, 0.461), (0.496, 0.586, 0.676), 0.239, 3),
                Saved("depth, twice", 1.07e+11, 5.36e+11, (0.085, 0.289, 0.493), (0.268, 0.431, 0.594), 0.136, 3),
                Saved("depth, twice", 1.07e+11, 1.07e+12, (0.031, 0.251, 0.472), (0.128, 0.326, 0.524), 0.073, 3),
            ),
            (0.957, 0.1),
        ),
        Recipe(
            "default, one rate, both", "both", 0.739, 0.113, 3,
            {"dynamics": None}, 1, 0,
            (
                Saved("both", 1.78e+11, 4.45e+11, (nan, 0.365, nan), (nan, 0.619, nan), 0.428, 1),
                Saved("both", 1.78e+11, 7.43e+11, (nan, 0.212, nan), (nan, 0.401, nan), 0.31, 1),
                Saved("both", 1.78e+11, 1.19e+12, (nan, 0.108, nan), (nan, 0.242, nan), 0.219, 1),
            ),
            (0.98, 0.1),
        ),
        Recipe(
            "Sparkling fresh and Stack", "both", 1.013, 0.137, 3,
            {"dynamics": None,
             "state": "drop",
             "width": width.Sparkling(fan_out='random', fan_in='zero'),
             "depth": depth.Stack(remainder='bottom', ignore_first=0, ignore_last=0)}, 0.5, 60,
            (
                Saved("both", 1.78e+11, 4.45e+11, (nan, 0.385, nan), (nan, 0.631, nan), 0.428, 1),
                Saved("both", 1.78e+11, 7.43e+11, (nan, 0.304, nan), (nan, 0.471, nan), 0.31, 1),
                Saved("both", 1.78e+11, 1.19e+12, (nan, 0.26, nan), (nan, 0.371, nan), 0.219, 1),
            ),
            (0.98, 0.1),
        ),
    )
}  # fmt: skip
