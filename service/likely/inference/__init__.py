"""Generated stubs of the Open Inference Protocol; see protos/likely/inference."""
