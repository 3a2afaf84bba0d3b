variable "name" {
  description = "Prefix of everything that is made."
  type        = string
  default     = "fluid"
}

variable "region" {
  type    = string
  default = "us-east-1"
}

variable "kubernetes_version" {
  type    = string
  default = "1.34"
}

variable "namespace" {
  description = "Where the Ray clusters run."
  type        = string
  default     = "default"
}

variable "cpu_instance_type" {
  type    = string
  default = "m7i.8xlarge"
}

variable "cpu_nodes" {
  type    = number
  default = 16
}

variable "gpu_instance_type" {
  type    = string
  default = "p5.48xlarge"
}

variable "gpu_nodes" {
  type    = number
  default = 8
}
