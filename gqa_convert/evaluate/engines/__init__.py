"""The decode benchmark in the engines that people serve with, each model in a process of its own."""
