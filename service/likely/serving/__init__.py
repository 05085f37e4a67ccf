"""The gRPC layer over the engine: access control, validation, services and error handling."""
