"""`python -m fairseq_sigma` prints this package's folder: `fairseq-train --user-dir "$(python -m fairseq_sigma)"`."""

from pathlib import Path

if __name__ == "__main__":
    print(Path(__file__).parent)
