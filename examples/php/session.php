<?php
/*
 * A session as every shop has one: a counter, a flash message, a cart of a few kB, a login that renews the id, a logout.
 * Nothing in here knows of sessionfs: session.save_path is the only setting that differs from a stock PHP.
 *
 * GET /?do=count   count, show the flash message of the last request, leave one for the next, put an item into the cart
 * GET /?do=login   the same under a new id: session_regenerate_id(true)
 * GET /?do=logout  session_destroy()
 */
if (!session_start()) { // the mount is gone: the load balancer shall try another server
    http_response_code(503);
    exit;
}

$do = $_GET['do'] ?? 'count';
if ($do === 'logout') {
    $_SESSION = [];
    $answer = ['destroyed' => session_destroy()];
} else {
    if ($do === 'login') {
        session_regenerate_id(true);
    }
    $answer = [
        'is_new' => !isset($_SESSION['count']),
        'count' => $_SESSION['count'] = ($_SESSION['count'] ?? 0) + 1,
        'flash' => $_SESSION['flash'] ?? null,
        'id' => session_id(),
    ];
    unset($_SESSION['flash']);
    if (isset($_GET['flash'])) {
        $_SESSION['flash'] = $_GET['flash'];
    }
    $cart = $_SESSION['cart'] ?? [];
    $cart[] = ['article' => $answer['count'], 'text' => str_repeat(md5((string) $answer['count']), 3)];
    $_SESSION['cart'] = array_slice($cart, -40); // about 6 kB
    $answer['cart'] = array_column($_SESSION['cart'], 'article');
    $answer['is_cart_whole'] = array_reduce($_SESSION['cart'], fn ($is_whole, $item) =>
        $is_whole && $item['text'] === str_repeat(md5((string) $item['article']), 3), true);
    session_write_close();
}
header('Content-Type: application/json');
echo json_encode($answer), "\n";
