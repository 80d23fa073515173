"""One step of linear-Gaussian algebra, in covariance and square-root form, and its scans."""

from elkax.gaussian.covariance import Covariance
from elkax.gaussian.form import Form
from elkax.gaussian.kalman import KalmanFilter, Summary
from elkax.gaussian.model import Model
from elkax.gaussian.output import FilterOutput
from elkax.gaussian.square_root import SquareRoot

__all__ = ["Covariance", "FilterOutput", "Form", "KalmanFilter", "Model", "SquareRoot", "Summary"]
