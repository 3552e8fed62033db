"""How numbers are written, the same on the terminal, in the report and in a rule's evidence."""


def number(value: float, digits: int = 3) -> str:
    """`digits` significant digits without trailing zeros: 0.38, 9.62, 0.000412; scientific below 1e-4."""
    return f"{value:.{digits}g}"


def signed(value: float) -> str:
    """Three decimals with a sign: +0.021; what rounds to nothing is 0.000."""
    text = f"{value:+.3f}"
    return "0.000" if float(text) == 0 else text.replace("-", "−")


def probability(value: float) -> str:
    """Two decimals, but never a certainty that no finite number of trials gives."""
    if value >= 0.995:
        return "> 0.99"
    return "< 0.01" if value < 0.005 else f"{value:.2f}"


def with_relation(name: str, value: float) -> str:
    """`P = 0.97`, `P > 0.99`."""
    text = probability(value)
    return f"{name} {text}" if text[0] in "<>" else f"{name} = {text}"


def percent(fraction: float) -> str:
    """A whole percentage, with one digit below 1 %: 5 %, 0.4 %."""
    if 0 < fraction < 0.0005:
        return "< 0.1 %"
    return f"{100 * fraction:.0f} %" if fraction >= 0.0095 or fraction <= 0 else f"{100 * fraction:.1f} %"


def temperature(value: float) -> str:
    """A temperature with at least one decimal: 1.0, 2.75."""
    text = f"{value:.3g}"
    return text if "." in text else f"{text}.0"


def count(amount: int, noun: str) -> str:
    """`1 seed`, `3 seeds`."""
    return f"{amount} {noun}" if amount == 1 else f"{amount} {noun}s"


def setting(beta_kl: float | None, kl_temperature: float | None) -> str:
    """`beta_kl 0.5, T 1.0`; None is the model before training, and at 0 temperature is inert."""
    if beta_kl is None or kl_temperature is None:
        return "before training"
    return f"beta_kl {number(beta_kl)}" + (f", T {temperature(kl_temperature)}" if beta_kl else "")
