"""What a run needs and costs, by calculation alone: no weights are read, no GPU and no torch are needed."""
