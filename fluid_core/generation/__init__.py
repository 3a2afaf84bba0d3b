"""Generation: guidance, the decoding engine, editing, and FluidPipeline."""
