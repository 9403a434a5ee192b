"""RUN AND REPORT: run one growth: collect live tensors, check live objects, synchronize DDP processes, write the report."""
