"""The process of one contender; started by `benchmarks.speed.children.Apart`, not by people."""

from benchmarks.speed.children import serve

if __name__ == "__main__":
    serve()
