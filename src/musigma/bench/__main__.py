"""The process of one contender; started by `musigma.bench.children.Apart`, not by people."""

from musigma.bench.children import serve

if __name__ == "__main__":
    serve()
