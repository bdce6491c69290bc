"""The resident agent: owns a device's data, states and model, and answers over gRPC."""
