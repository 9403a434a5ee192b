"""PLAN: a spec, sizes and methods to a GrowthPlan; arithmetic on integers and floats, without torch."""
