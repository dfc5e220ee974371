"""The pictures of the documentation: ``make figures`` draws them into docs/images."""
