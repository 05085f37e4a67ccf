"""gRPC over the engine: who may ask, what a message may hold, and what an error becomes."""
