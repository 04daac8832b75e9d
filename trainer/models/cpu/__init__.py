"""What makes a step fast on CPUs, apart from the papers' models: each file names the benchmark that justifies it."""
