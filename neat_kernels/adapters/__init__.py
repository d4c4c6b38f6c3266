"""Put the layer into a model, take it out again."""
