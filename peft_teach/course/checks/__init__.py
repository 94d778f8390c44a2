"""What each chapter's answers are checked with: probes, oracles, hints. One file a chapter."""
