"""Tasks: multiple choice by likelihood, and the models and tasks of lm-evaluation-harness."""
