<?php
/* A client with one cookie that alternates between servers: php client.php REQUESTS URL URL... Exits with 1 on a loss. */
[, $n_requests] = $argv;
$urls = array_slice($argv, 2);
$cookie = '';

function request(string $url, string &$cookie): array
{
    $options = ['http' => ['header' => $cookie === '' ? '' : "Cookie: $cookie\r\n", 'ignore_errors' => true, 'timeout' => 10]];
    $body = file_get_contents($url, false, stream_context_create($options));
    foreach ($http_response_header ?? [] as $line) {
        if (preg_match('/^Set-Cookie: (PHPSESSID=[^;]+)/i', $line, $match)) {
            $cookie = $match[1];
        }
    }
    return json_decode((string) $body, true) ?? exit("no session from $url: $body\n");
}

for ($i = 1; $i <= $n_requests; $i++) {
    $url = $urls[$i % count($urls)];
    $answer = request($url . ($i % 10 ? '/?do=count' : '/?do=login') . '&flash=seen' . $i, $cookie);
    printf("%3d %-28s count %d, %s, %d articles in the cart\n", $i, $url, $answer['count'], $answer['flash'] ?? '-',
        count($answer['cart']));
    $is_right = $answer['count'] === $i && $answer['flash'] === ($i > 1 ? 'seen' . ($i - 1) : null) && $answer['is_cart_whole'];
    if (!$is_right) {
        fwrite(STDERR, "something was lost: " . json_encode($answer) . "\n");
        exit(1);
    }
    usleep(20000); // until saves are acknowledged by the other holders of a session
}
request($urls[0] . '/?do=logout', $cookie);
echo "$n_requests requests, ", count($urls), " servers, one session: nothing was lost\n";
