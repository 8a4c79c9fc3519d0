"""LLaVA's place of `llava.eval.convert_seed_for_submission`; the same flags."""

from llava.eval.convert_seed_for_submission import main

if __name__ == "__main__":
    raise SystemExit(main())
