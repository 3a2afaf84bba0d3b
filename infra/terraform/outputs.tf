output "bucket" {
  description = "Write data sets, checkpoints and bundles under s3://<bucket>/."
  value       = aws_s3_bucket.data.bucket
}

output "kubeconfig" {
  description = "The command that lets kubectl in."
  value       = "aws eks update-kubeconfig --region ${var.region} --name ${module.cluster.cluster_name}"
}
