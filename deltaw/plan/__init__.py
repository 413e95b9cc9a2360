"""What a run will cost before it starts, and the choices that make it fit: memory by part and phase, time by step."""
