"""Order, place and memory: what a recipe says, what is done already, where each stage runs, what it told."""
