"""How far an image may move before a prediction can change: lower bounds, and what they rest on."""
