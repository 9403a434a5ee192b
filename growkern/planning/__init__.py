"""Planning: make a GrowthPlan from a spec, sizes and methods, by arithmetic on integers and floats, without torch."""
