"""RUN AND REPORT: what stands around a growth: live tensors, live objects, processes, the report."""
