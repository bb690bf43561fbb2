"""The program: builds model, data and engine from a config and runs the loop."""
